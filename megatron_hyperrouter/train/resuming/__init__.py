"""Where a run begins, and what a checkpoint must agree with."""
