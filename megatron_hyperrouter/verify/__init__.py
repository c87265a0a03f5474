"""Checks whether layouts train the same model."""
