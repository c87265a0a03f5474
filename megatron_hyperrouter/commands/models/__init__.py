"""Commands on a trained run."""
