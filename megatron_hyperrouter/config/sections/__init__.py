"""Sections of the tree of settings."""
