"""Commands that compare, scale and verify."""
