"""One rank of many without memory, GPUs or other ranks: the true engine over fake tensors."""
