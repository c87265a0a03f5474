"""Classes of transformers: which class computes a model, the names of its settings, and the form of its
tensors.
"""
