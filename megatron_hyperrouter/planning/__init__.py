"""Plans a run before it has GPUs: which layouts run, what each rank has to hold, how long a step takes."""
