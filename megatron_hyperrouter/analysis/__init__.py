"""What trained models and finished runs look like from outside."""
