"""Watching a run from outside: its state, told by the files in its folder alone."""
