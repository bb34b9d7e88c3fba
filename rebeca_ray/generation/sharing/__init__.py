"""Sharing: users of a bucket show one image where their planned embeddings are near.

May import: `context`, `decisions` and `parts` of generation, and what they may.
Must not hold: a stage of a run.
"""
