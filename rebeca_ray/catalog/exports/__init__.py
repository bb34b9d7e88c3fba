"""Exports: the published snapshot for what does not read Parquet: image objects, key-values, Iceberg tables.

May import: `catalog`, and what it may.
Must not hold: anything about a run.
"""
