"""Conclusions of the scaling studies: the constants of a machine, and the best size for a budget."""
