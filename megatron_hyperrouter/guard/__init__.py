"""Protection of a run: requests to stop, bad steps, hangs, and their records."""
