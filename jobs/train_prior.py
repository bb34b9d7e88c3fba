#!/usr/bin/env python3
"""Train the prior with Ray Train: `ray job submit --working-dir . -- jobs/train_prior.py [--config FILE] [--dry-run] [key.sub=value …]`."""

from pathlib import Path

from rebeca_ray.cli.commands import train
from rebeca_ray.cli.runner import run_job

if __name__ == "__main__":
    run_job(train, default=Path(__file__).parent / "configs" / "train_stickers.yaml")
