#!/usr/bin/env python3
"""Generate one snapshot of a catalog, and publish it.

`ray job submit --working-dir . -- jobs/generate_catalog.py [--config FILE] [--dry-run] [--log-level LEVEL]
[--resume auto|require|never] [--retry-failed] [--force] [KEY.SUB=VALUE …]`
"""

from pathlib import Path

from rebeca_ray.cli.commands import generate
from rebeca_ray.cli.runner import run_script

if __name__ == "__main__":
    run_script(generate, config=Path(__file__).parent / "configs" / "generate_stickers.yaml")
