"""Storage: where bytes live, on a disk or in an object store, and how they are written so that no reader sees half a file.

May import: `errors`, `schemas`, `identity`, `noise`, `console`.
Must not hold: anything about catalogs, models, configs, Ray or torch.
"""
