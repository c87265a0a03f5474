"""Attention: the core, positions, latent vectors and document boundaries."""
