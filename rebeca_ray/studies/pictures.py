"""Read the encoded images of some real items, and turn images into tensors."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from PIL import Image

from rebeca_ray import schemas
from rebeca_ray.data.validation import check_columns
from rebeca_ray.errors import InputError
from rebeca_ray.pixels import see_image
from rebeca_ray.storage.parquet import open_parquet

ROWS_AT_ONCE = 1000


def read_pictures(uri: str, item_ids: set[str]) -> dict[str, bytes]:
    """Return encoded images of real items by id. Raises InputError if one of them is missing."""
    source = open_parquet(uri, "images")
    pictures: dict[str, bytes] = {}
    for batch in source.batches(check_columns(source, schemas.ITEMS), ROWS_AT_ONCE):
        ids = batch["item_id"].to_pylist()
        rows = [row for row, item in enumerate(ids) if item in item_ids]
        values = (
            pc.struct_field(batch["image"].combine_chunks(), "bytes")
            .take(pa.array(rows, pa.int64()))
            .to_pylist()
        )
        pictures.update({ids[row]: value for row, value in zip(rows, values, strict=True) if value})
    if missing := item_ids - pictures.keys():
        raise InputError(
            f"images {uri}: no image of {len(missing)} items, such as {min(missing)}; give all real items"
        )
    return pictures


def picture_tensor(encoded: Sequence[bytes], size: int) -> torch.Tensor:
    """Return encoded images as floats [N, 3, size, size] in [-1, 1], resized to squares."""
    images = [see_image(image).resize((size, size), Image.Resampling.BICUBIC) for image in encoded]
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2)
    return pixels.float() / 127.5 - 1
