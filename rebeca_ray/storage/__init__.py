"""Storage: read and write bytes on a disk or in an object store, so that no reader sees half a file.

May import: `errors`, `schemas`, `identity`, `noise`, `console`, `log`.
Must not hold: anything about catalogs, models, configs, Ray or torch.
"""
