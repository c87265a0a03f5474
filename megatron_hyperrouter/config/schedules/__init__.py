"""What changes from step to step: the data that is read, and how much of it in a step."""
