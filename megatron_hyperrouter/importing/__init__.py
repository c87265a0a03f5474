"""Models from others: Hugging Face folders as runs of ours, dense models as mixtures of experts."""
