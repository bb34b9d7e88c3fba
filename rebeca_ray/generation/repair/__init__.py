"""Repair: damaged files cost the users with items in them, and a row that kills its process costs itself.

May import: `context` and `decisions` of generation, and what they may.
Must not hold: a stage of a run.
"""
