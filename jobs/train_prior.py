#!/usr/bin/env python3
"""Train a prior with Ray Train.

`ray job submit --working-dir . -- jobs/train_prior.py [--config FILE] [--dry-run] [--log-level LEVEL]
[KEY.SUB=VALUE …]`
"""

from pathlib import Path

from rebeca_ray.cli.commands import train
from rebeca_ray.cli.runner import run_script

if __name__ == "__main__":
    run_script(train, config=Path(__file__).parent / "configs" / "train_stickers.yaml")
