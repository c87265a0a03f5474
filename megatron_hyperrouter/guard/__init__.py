"""What keeps a run from being lost: requests to stop, bad steps, hangs, and their records."""
