"""What a run begins with, and in what a checkpoint must agree with its settings."""
