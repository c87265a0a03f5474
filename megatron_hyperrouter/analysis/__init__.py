"""Measures of trained models and finished runs."""
