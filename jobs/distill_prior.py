#!/usr/bin/env python3
"""Distill a trained prior: `ray job submit --working-dir . -- jobs/distill_prior.py [--config FILE] [--dry-run] [key.sub=value …]`."""

from pathlib import Path

from rebeca_ray.cli.commands import distill
from rebeca_ray.cli.runner import run_job

if __name__ == "__main__":
    run_job(distill, default=Path(__file__).parent / "configs" / "distill_stickers.yaml")
