"""Stickers: the bundled world: rated sticker images, a small CLIP, a small Stable Diffusion with IP-Adapter, and their judge."""

import hashlib
from pathlib import Path

ASSETS = Path(__file__).parent / "assets"
ITEMS = ASSETS / "items.parquet"
CLIP = ASSETS / "clip"
DECODER = ASSETS / "decoder"
JUDGE = ASSETS / "judge"
IMAGE_SIZE = 64
EMBED_DIM = 256
STYLES = ("contrast", "flat", "fluent", "noto", "twemoji")


def is_held_out(name: str) -> bool:
    """True for the fixed 20% of sticker names that no bundled model saw in training.

    By name and not by item, so that one subject is held out in all five styles at once.
    """
    digest = hashlib.blake2b(name.encode(), digest_size=8, salt=b"stickers-4").digest()
    return int.from_bytes(digest, "big") % 5 == 0
