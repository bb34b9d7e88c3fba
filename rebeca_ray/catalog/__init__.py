"""Catalog: the published format: where everything lies, how it is read, checked, published and collected.

May import: `ray_runtime`, `config`, `storage`, and what they may.
Must not hold: torch, or anything that only a run needs.
"""
