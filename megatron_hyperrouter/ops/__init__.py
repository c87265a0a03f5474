"""Pure tensor functions: one operator per file, float32, no state, no collectives."""
