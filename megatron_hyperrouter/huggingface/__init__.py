"""Files that run under transformers, also in other environments: they import nothing of ours."""
