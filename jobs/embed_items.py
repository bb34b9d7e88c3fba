#!/usr/bin/env python3
"""Embed item images with CLIP.

`ray job submit --working-dir . -- jobs/embed_items.py [--config FILE] [--dry-run] [--log-level LEVEL]
[KEY.SUB=VALUE …]`
"""

from pathlib import Path

from rebeca_ray.cli.commands import embed
from rebeca_ray.cli.runner import run_script

if __name__ == "__main__":
    run_script(embed, config=Path(__file__).parent / "configs" / "embed_stickers.yaml")
