"""Rendering: work of a run on the machines that draw, before they draw.

May import: `context` and `decisions` of generation, and what they may.
Must not hold: a stage of a run.
"""
