"""Decoder: image embeddings -> encoded images, in this process or in Triton, by PyTorch or another engine.

May import: `config`, `storage`, `noise`, and their imports.
Must not hold: users, catalogs, Ray.
"""
