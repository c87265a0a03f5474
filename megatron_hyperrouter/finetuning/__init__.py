"""Fine-tuning of a trained run for classification: data, training, test, and comparison of two results."""
