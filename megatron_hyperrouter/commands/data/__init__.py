"""Commands that make and inspect data."""
