"""Attention and what it needs: positions, latent vectors, borders of documents."""
