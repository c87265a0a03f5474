"""From text to token files: tokenizers, encoding, preprocessing."""
