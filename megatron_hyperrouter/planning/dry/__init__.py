"""One rank of many, without memory, GPUs or other ranks: the real engine with fake tensors."""
