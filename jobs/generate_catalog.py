#!/usr/bin/env python3
"""Generate and publish one catalog snapshot.

`ray job submit --working-dir . -- jobs/generate_catalog.py [--config FILE] [--dry-run] [key.sub=value …]`, and
`[--resume auto|require|never] [--retry-failed] [--force]`
"""

from pathlib import Path

from rebeca_ray.cli.commands import generate
from rebeca_ray.cli.runner import run_job

if __name__ == "__main__":
    run_job(generate, default=Path(__file__).parent / "configs" / "generate_stickers.yaml")
