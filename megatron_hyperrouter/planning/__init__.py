"""Plans a run before it has GPUs: which layouts work, what each rank needs, how long a step takes."""
