"""Draw the items of a method with the catalog's decoder, once: a file keeps them for the next start.

Shapes: N items, B items of a chunk, D embed dim.
"""

import functools
from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from rebeca_ray import schemas
from rebeca_ray.config.decoder import DecoderSettings
from rebeca_ray.decoder.files import identify_decoder
from rebeca_ray.decoder.interface import DecodedImage, Decoder, Rows
from rebeca_ray.errors import StorageError
from rebeca_ray.identity import hash128, image_seed
from rebeca_ray.progress import counting
from rebeca_ray.storage.filesystem import exists, join
from rebeca_ray.storage.parquet import open_parquet, write_tables
from rebeca_ray.studies.methods import NEGATIVE, Wishes
from rebeca_ray.studies.sets import ItemSet

BATCHES_AT_ONCE = 4


def draw_set(
    name: str, wishes: Wishes, catalog: ItemSet, decoder: Decoder, settings: DecoderSettings, out: str
) -> ItemSet:
    """Return the items of a method, from `out/sets` if an earlier start drew the same ones.

    An item has the seed of the catalog's item in its position, whatever the method. Raises StorageError for
    an item that the decoder cannot draw.
    """
    rows = rows_of(wishes, catalog, settings)
    digest = hash128(
        fingerprint_of(settings),
        rows.image_embeds_BD.tobytes().hex(),
        *rows.seeds,
        *rows.prompts,
        *rows.negative_prompts,
        str(wishes.ip_adapter_scale),
        *([] if wishes.decoder_guidance_scale is None else [str(wishes.decoder_guidance_scale)]),
        *wishes.made_from,
    )
    uri = join(out, "sets", f"{name}-{digest}.parquet")
    if not exists(uri):
        schema = set_schema(catalog.embeds_ND.shape[1])
        tables = drawn_tables(name, rows, catalog, decoder, settings.batch_size * BATCHES_AT_ONCE, schema)
        with counting(f"draw {name}", len(rows)) as counted:
            write_tables(counted.tables(tables), schema, uri, row_group_size=100, embed_column="image_embeds")
    table = open_parquet(uri, "set").read(set_schema(catalog.embeds_ND.shape[1]))
    return ItemSet(
        name=name,
        description=f"{name}, drawn by "
        + ("a decoder of its own" if wishes.made_from else "the catalog's decoder"),
        user_id=catalog.user_id,
        user_N=catalog.user_N,
        item_id=table["item_id"].to_pylist(),
        embeds_ND=wishes.embeds_ND,
        encoded=[image["bytes"] for image in table["image"].to_pylist()],
    )


def without_gaps(settings: DecoderSettings) -> DecoderSettings:
    """Return a decoder that keeps images which the safety checker refuses: a set has an image of every item.

    A Triton server has a policy of its own.
    """
    if settings.backend == "triton":
        return settings
    return settings.model_copy(update={"safety": settings.safety.model_copy(update={"policy": "flag"})})


@functools.cache
def fingerprint_of(settings: DecoderSettings) -> str:
    """Return the decoder's fingerprint. It hashes all weights, so it is kept."""
    return identify_decoder(settings).fingerprint(settings)


def set_schema(embed_dim: int) -> pa.Schema:
    """Return the columns of a drawn set."""
    return pa.schema(
        [
            schemas.required("item_id", schemas.STRING),
            schemas.required("user_id", schemas.STRING),
            schemas.required("image_embeds", schemas.image_embeds(embed_dim)),
            schemas.required("image", schemas.IMAGE),
        ]
    )


def rows_of(wishes: Wishes, catalog: ItemSet, settings: DecoderSettings) -> Rows:
    """Return the decoder's rows, with the seeds of the catalog's items."""
    count = len(catalog.item_id)
    scale = settings.ip_adapter_scale if wishes.ip_adapter_scale is None else wishes.ip_adapter_scale
    guidance = wishes.decoder_guidance_scale
    if guidance is None:
        guidance = settings.decoder_guidance_scale
    prompts, negatives = wishes.prompts or ([str(wishes.prompt)] * count, [NEGATIVE[wishes.prompt]] * count)
    return Rows(
        image_embeds_BD=wishes.embeds_ND.astype(np.float32),
        seeds=[image_seed(item) for item in catalog.item_id],
        prompts=prompts,
        negative_prompts=negatives,
        guidance_scale_B=np.full(count, guidance, np.float32),
        ip_adapter_scale_B=np.full(count, scale, np.float32),
    )


def drawn_tables(
    name: str, rows: Rows, catalog: ItemSet, decoder: Decoder, size: int, schema: pa.Schema
) -> Iterator[pa.Table]:
    """Yield the drawn items, `size` at a time."""
    for start in range(0, len(rows), size):
        index = np.arange(start, min(start + size, len(rows)))
        chunk = rows.take(index)
        drawn = decoder.decode(chunk)
        check_drawn(name, drawn)
        embeds = pa.FixedSizeListArray.from_arrays(
            pa.array(chunk.image_embeds_BD.ravel()), type=schema.field("image_embeds").type
        )
        columns = [
            [hash128(name, catalog.item_id[row]) for row in index],
            [catalog.user_id[user] for user in catalog.user_N[index]],
            embeds,
            pa.array([{"bytes": image.image, "path": None} for image in drawn], schemas.IMAGE),
        ]
        yield pa.table(columns, schema=schema)


def check_drawn(name: str, drawn: list[DecodedImage]) -> None:
    """Raise StorageError for an item without an image."""
    for image in drawn:
        if image.image is None:
            reason = image.error or "the safety policy left it out"
            raise StorageError(f"method {name}: an item has no image ({reason}); run again, or leave it out")
