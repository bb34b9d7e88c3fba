"""Data: what people give: interactions, histories, items and their embeddings, ratings of generated items. Read and validated.

May import: `catalog`, `ray_runtime`, `config`, `storage`, and what they may.
Must not hold: models that learn, or anything about a run.
"""
