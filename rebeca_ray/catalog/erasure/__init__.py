"""Erasure: everything of some people goes from every snapshot and export, and stays away.

May import: `catalog`, `catalog.exports`, and everything that `catalog` may import.
Must not hold: torch, or anything of a prior or of a training.
"""
