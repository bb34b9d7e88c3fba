#!/usr/bin/env python3
"""Generate and publish one catalog snapshot.

`ray job submit --working-dir . -- jobs/generate_catalog.py [--config FILE] [--dry-run] [key.sub=value …]`
"""

from pathlib import Path

from rebeca_ray.config import GenerateConfig
from rebeca_ray.job import generate, run_job

if __name__ == "__main__":
    run_job(GenerateConfig, generate, default=Path(__file__).parent / "configs" / "generate_stickers.yaml")
