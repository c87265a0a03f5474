"""Studies of many runs, and their results."""
