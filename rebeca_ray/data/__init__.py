"""Data: the inputs that people give, read and validated: interactions, items, embeddings, ratings.

May import: `catalog`, `ray_runtime`, `config`, `storage`, and their imports.
Must not hold: models that learn, or anything about a run.
"""
