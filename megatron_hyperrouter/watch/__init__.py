"""Watching a run from outside: its state, from the files in its folder."""
