"""What the scaling studies conclude: the constants of a machine, and the best size for a budget."""
