"""The order of samples: shuffled, on demand, packed, blended; index files."""
