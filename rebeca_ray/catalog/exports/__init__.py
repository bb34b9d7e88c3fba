"""Exports of the published snapshot for systems without Parquet: image objects, key-values, Iceberg tables.

May import: `catalog`, and everything that `catalog` may import.
Must not hold: anything about a run.
"""
