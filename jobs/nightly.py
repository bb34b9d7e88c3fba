#!/usr/bin/env python3
"""One night: embed new items, train if due, generate, collect garbage; missed dates first, nothing twice.

`ray job submit --working-dir . -- jobs/nightly.py [--config FILE] [--dry-run] [run_date=YYYY-MM-DD] [key.sub=value …]`
"""

from pathlib import Path

from rebeca_ray.cli.commands import nightly
from rebeca_ray.cli.runner import run_job

if __name__ == "__main__":
    run_job(nightly, default=Path(__file__).parent / "configs" / "nightly_stickers.yaml")
