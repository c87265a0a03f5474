"""Pure tensor functions: one operator a file, float32, no state, no collectives."""
