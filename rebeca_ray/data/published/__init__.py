"""Published data sets in their original layouts, read and written as interactions and items.

May import: `data`, `schemas`, `storage`, and their imports.
Must not hold: training, embedding, or a download: people fetch the data sets themselves.
"""
