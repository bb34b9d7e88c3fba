#!/usr/bin/env python3
"""Run one night: embed new items, train if due, generate, collect garbage. Missed dates are backfilled first.

`ray job submit --working-dir . -- jobs/nightly.py [--config FILE] [--dry-run] [--log-level LEVEL]
[run_date=YYYY-MM-DD] [KEY.SUB=VALUE …]`
"""

from pathlib import Path

from rebeca_ray.cli.commands import nightly
from rebeca_ray.cli.runner import run_script

if __name__ == "__main__":
    run_script(nightly, config=Path(__file__).parent / "configs" / "nightly_stickers.yaml")
