#!/usr/bin/env python3
"""Evaluate a catalog, or compare it with another one and with baselines.

`ray job submit --working-dir . -- jobs/evaluate_catalog.py [--config FILE] [--dry-run] [--truth FILE]
[--log-level LEVEL] [KEY.SUB=VALUE …]`
"""

from pathlib import Path

from rebeca_ray.cli.commands import evaluate
from rebeca_ray.cli.runner import run_script

if __name__ == "__main__":
    run_script(evaluate, config=Path(__file__).parent / "configs" / "evaluate_stickers.yaml")
