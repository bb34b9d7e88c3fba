#!/usr/bin/env python3
"""Train priors on a grid of settings with Ray Tune, and show the best.

`ray job submit --working-dir . -- jobs/tune_prior.py [--config FILE] [--dry-run] [--log-level LEVEL]
[KEY.SUB=VALUE …]`
"""

from pathlib import Path

from rebeca_ray.cli.commands import tune
from rebeca_ray.cli.runner import run_script

if __name__ == "__main__":
    run_script(tune, config=Path(__file__).parent / "configs" / "tune_stickers.yaml")
