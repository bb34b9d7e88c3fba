"""The catalog: immutable Parquet snapshots below one root, one of them published by a single pointer."""
