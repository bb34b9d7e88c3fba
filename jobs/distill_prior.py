#!/usr/bin/env python3
"""Distill a trained prior into a faster one.

`ray job submit --working-dir . -- jobs/distill_prior.py [--config FILE] [--dry-run] [--log-level LEVEL]
[KEY.SUB=VALUE …]`
"""

from pathlib import Path

from rebeca_ray.cli.commands import distill
from rebeca_ray.cli.runner import run_script

if __name__ == "__main__":
    run_script(distill, config=Path(__file__).parent / "configs" / "distill_stickers.yaml")
