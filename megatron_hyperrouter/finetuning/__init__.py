"""A classification head on a trained run: data, training, test, and comparisons of two fine-tunings."""
