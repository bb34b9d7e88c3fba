#!/usr/bin/env python3
"""Embed items with CLIP: `ray job submit --working-dir . -- jobs/embed_items.py [--config FILE] [--dry-run] [key.sub=value …]`."""

from pathlib import Path

from rebeca_ray.cli.commands import embed
from rebeca_ray.cli.runner import run_job

if __name__ == "__main__":
    run_job(embed, default=Path(__file__).parent / "configs" / "embed_stickers.yaml")
