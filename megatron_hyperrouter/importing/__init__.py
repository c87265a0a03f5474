"""Import of models: Hugging Face folders as runs, and dense models as mixtures of experts."""
