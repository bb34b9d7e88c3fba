"""Write the pictures of the safety checker's reference as raw bytes, for `reference.mjs` to read.

npm install nsfwjs@4.3.0 @tensorflow/tfjs@4.22.0
python -m tests.decoder.safety_reference.images pictures
node reference.mjs pictures > expected.json
"""

import io
import json
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from rebeca_ray.stickers import ITEMS

STICKERS = (0, 2204, 5273, 6042, 7038)  # some that the network takes for unsafe


def pictures() -> dict[str, np.ndarray]:
    """Return stickers, noise, skin-coloured discs and waves, of several sizes and shapes."""
    column = pq.read_table(ITEMS, columns=["image"])["image"]
    images = {
        f"sticker {row}": np.asarray(Image.open(io.BytesIO(column[row].as_py()["bytes"])).convert("RGB"))
        for row in STICKERS
    }
    y, x = np.mgrid[:300, :200]
    images["discs"] = np.full((300, 200, 3), (92, 64, 51), np.uint8)
    images["discs"][(y - 110) ** 2 + (x - 100) ** 2 < 70**2] = (224, 172, 140)
    images["discs"][(y - 220) ** 2 + (x - 100) ** 2 < 60**2] = (204, 142, 105)
    images["noise"] = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    y, x = np.mgrid[:224, :224]
    images["waves"] = np.stack([x * y % 256, (x + 2 * y) % 256, (3 * x) % 256], axis=2).astype(np.uint8)
    images["black"] = np.zeros((8, 8, 3), np.uint8)
    return images


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir()
    shapes = {}
    for number, (name, image) in enumerate(pictures().items()):
        (folder / f"{number}.raw").write_bytes(np.ascontiguousarray(image).tobytes())
        shapes[name] = list(image.shape)
    (folder / "shapes.json").write_text(json.dumps(shapes))
