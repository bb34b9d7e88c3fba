"""Nightly generated recommendations: a diffusion prior over CLIP embeddings, decoded into a Parquet catalog."""

__version__ = "0.1.0"
