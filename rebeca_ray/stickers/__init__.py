"""Stickers: the bundled world: sticker images, simulated users, small CLIP, small Stable Diffusion, judge.

May import: every room but `cli`.
Must not hold: anything that another room needs.
"""

import hashlib
from pathlib import Path

ASSETS = Path(__file__).parent / "assets"
ITEMS = ASSETS / "items.parquet"
CLIP = ASSETS / "clip"
DECODER = ASSETS / "decoder"
JUDGE = ASSETS / "judge"
IMAGE_SIZE = 64
EMBED_DIM = 256


def is_held_out(name: str) -> bool:
    """Return whether a name is among the fixed 20% that no bundled model saw in training.

    The name decides, so one subject is held out in all five styles at once.
    """
    digest = hashlib.blake2b(name.encode(), digest_size=8, salt=b"stickers-4").digest()
    return int.from_bytes(digest, "big") % 5 == 0
