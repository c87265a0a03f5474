"""Classes of transformers: which one computes a model, what its settings are called, how its tensors lie."""
