"""Items: embed images with open_clip in a Ray Data stage, and read embedded items back.

items (images) -> `embed_items` -> embedded items, a folder with a marker -> `read_image_embeds`
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rebeca_ray import schemas
from rebeca_ray.config.jobs import EmbedConfig
from rebeca_ray.data.clip import EmbedImages, clip_fingerprint
from rebeca_ray.data.streaming import stream
from rebeca_ray.data.validation import check_columns, check_ids, check_rows
from rebeca_ray.errors import InputError, shown
from rebeca_ray.ray_runtime import ExcludeIds, require_room, start_ray, with_log
from rebeca_ray.storage.data_file import DataFile
from rebeca_ray.storage.filesystem import arrow_filesystem, delete, join, open_filesystem
from rebeca_ray.storage.objects import JsonObject, read_json, write_json
from rebeca_ray.storage.parquet import ParquetInput, open_parquet
from rebeca_ray.storage.writable import require_own, require_writable

MARKER = "embedding.json"  # beside embedded items: their number, and the CLIP that made them
ROWS_AT_ONCE = 10_000
UNFINISHED: JsonObject = {"clip": None, "rows": None}


@dataclass(frozen=True, kw_only=True)
class EmbeddedItems:
    """I items: ids [I] of str, embeddings [I, D] float32. `clip` is None without a marker beside them."""

    item_id: np.ndarray
    image_embeds: np.ndarray
    clip: str | None


def embed_items(config: EmbedConfig, *, only_new: bool = False) -> int:
    """Embed every item of `config.items` and write `config.out`, a folder of Parquet files.

    Returns how many items were embedded. `only_new` keeps the embeddings in `config.out` and adds items whose
    `item_id` is new. If another CLIP made the existing ones, all items are embedded again.
    """
    source = open_parquet(config.items, "items")
    columns = check_columns(source, schemas.ITEMS, instead={"image_embeds": "nothing is left to embed"})
    item_id = read_item_ids(source)
    if f"{config.items}/".startswith(f"{config.out.rstrip('/')}/"):
        raise InputError(
            f"out {config.out}: holds the items themselves and would be replaced; choose another folder"
        )
    out_filesystem, out_path = open_filesystem(config.out)
    require_own(config.out, "out", MARKER, "clip")
    fingerprint = clip_fingerprint(config.clip)
    require_writable(config.out, "out")

    # Embeddings of another CLIP cannot be compared with new ones, so only those of the same CLIP are kept.
    marker = read_json(join(config.out, MARKER)) or {}
    kept = None
    if only_new and marker.get("clip") == fingerprint:
        kept = read_item_ids(open_parquet(config.out, "items"))
        if pc.all(pc.is_in(pa.array(item_id), value_set=pa.array(kept))).as_py():
            return 0

    start_ray()
    require_room(
        "num_actors",
        workers=config.num_actors,
        cpus=config.cpus_per_actor,
        device=config.device,
        spare_cpus=1,
    )
    import ray

    items = stream(source, columns, config.batch_size, refuse_paths)
    if kept is not None:
        items = items.map_batches(ExcludeIds(pa.array(kept)), batch_format="pyarrow", batch_size=None)
    # A small file is one block, and one actor would embed it alone.
    blocks = items.repartition(target_num_rows_per_block=config.batch_size)
    dataset = blocks.map_batches(
        with_log(EmbedImages),
        fn_constructor_args=(config.clip, config.device),
        batch_size=config.batch_size,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=config.num_actors),
        num_cpus=config.cpus_per_actor,
        num_gpus=1 if config.device == "cuda" else 0,
    ).materialize()
    source.require_unchanged("it was embedded")
    if kept is None:
        delete(config.out)  # only now, since the new ones are complete

    # The marker is complete only after the files: after a crash in between, the next run embeds all items.
    write_json(UNFINISHED, join(config.out, MARKER))
    dataset.write_parquet(out_path, filesystem=arrow_filesystem(out_filesystem))
    embedded = dataset.count()
    meta = {
        "clip": fingerprint,
        "clip_name": config.clip,
        "rows": embedded + (0 if kept is None else len(kept)),
    }
    write_json(meta, join(config.out, MARKER))
    return embedded


def refuse_paths(batch: pa.Table, file: DataFile, first_row: int) -> None:
    """Raise InputError for an image that is a path without bytes."""
    image = batch["image"].combine_chunks()
    path = pc.struct_field(image, "path")
    is_path = pc.and_(pc.is_null(pc.struct_field(image, "bytes")), pc.not_equal(pc.fill_null(path, ""), ""))
    if rows := np.flatnonzero(is_path.to_numpy(zero_copy_only=False)).tolist():
        raise InputError(
            f"items {file.uri}: row {first_row + rows[0]} of {file.name} has an image by path alone "
            f"({shown(path[rows[0]].as_py())}), expected its bytes; read each file, and write its bytes"
        )


def read_image_embeds(uri: str) -> EmbeddedItems:
    """Read all embedded items of `uri` into memory.

    Raises InputError for a missing column, nulls, repeated ids, and embeddings that are zero or not finite.
    """
    items = open_parquet(uri, "items")
    _, clip = embedded_with(items)
    item_id = read_item_ids(items)
    column = items.read(embeds_column(items))["image_embeds"].combine_chunks()
    items.require_unchanged("it was read")
    return EmbeddedItems(item_id=item_id, image_embeds=checked_embeds(column, item_id, uri), clip=clip)


def check_image_embeds(items: ParquetInput) -> None:
    """Raise the errors of `read_image_embeds` without holding all embeddings in memory."""
    embed_dim, _ = embedded_with(items)
    item_id = read_item_ids(items)
    start = 0
    for batch in items.batches(embeds_column(items), ROWS_AT_ONCE):
        column = batch["image_embeds"].combine_chunks()
        values = checked_embeds(column, item_id[start : start + len(column)], items.uri)
        start += len(column)
        if values.shape[1] != embed_dim:
            raise several_sizes(items.uri, [embed_dim, values.shape[1]])


def checked_embeds(column: pa.Array, item_id: np.ndarray, uri: str) -> np.ndarray:
    """Return the embeddings of a column as an array [I, D].

    Raises InputError for embeddings that are missing, of several sizes, zero or not finite.
    """
    if column.null_count:
        raise InputError(
            f"items {uri}: {column.null_count} of {len(column)} image_embeds are null; "
            "embed those items again"
        )
    sizes = pc.unique(pc.list_value_length(column)).to_pylist()
    if len(sizes) != 1:
        raise several_sizes(uri, sizes)
    values = column.flatten().to_numpy(zero_copy_only=False).astype(np.float32).reshape(len(column), -1)
    with np.errstate(over="ignore"):
        length = np.linalg.norm(values, axis=1)
    bad = ~np.isfinite(length) | (length == 0)
    if bad.any():
        names = ", ".join(shown(name)[1:-1] for name in item_id[bad][:3].tolist())
        raise InputError(
            f"items {uri}: {bad.sum()} of {len(bad)} image_embeds are zero or not finite ({names}); "
            "embed those items again"
        )
    return values


def several_sizes(uri: str, sizes: list[int]) -> InputError:
    """Return the error for embeddings of several sizes."""
    return InputError(
        f"items {uri}: image_embeds has rows of {len(sizes)} sizes ({sizes[:3]}); every item needs the same D"
    )


def read_item_ids(items: ParquetInput) -> np.ndarray:
    """Return the ids of all items, in the order of their embeddings.

    Raises InputError for a table without rows, and for ids that are invalid or repeated.
    """
    column = check_columns(items, pa.schema([schemas.ITEMS.field("item_id")]))
    table = items.read(column)
    check_rows(table, "items", items.uri)
    check_ids(table["item_id"], "items", items.uri, "item_id", unique="keep one row per item")
    return table["item_id"].to_numpy(zero_copy_only=False)


def embedded_with(items: ParquetInput) -> tuple[int, str | None]:
    """Return D, from the schema or the first row, and the fingerprint of the CLIP, from the marker.

    The fingerprint is None if there is no marker. Raises InputError for a missing column, a first row without
    an embedding, and an embedding job that did not finish.
    """
    column = embeds_column(items)
    kind = column.field("image_embeds").type
    if pa.types.is_fixed_size_list(kind):
        embed_dim = kind.list_size
    else:
        first: Any = next((batch["image_embeds"] for batch in items.batches(column, 1)), [])
        embed_dim = len(first[0]) if len(first) and first[0].is_valid else 0
    if not embed_dim:
        raise InputError(
            f"items {items.uri}: the first row has no image_embeds; drop it, or embed the items again"
        )
    marker = read_json(join(items.uri, MARKER))
    if marker == UNFINISHED:
        raise InputError(
            f"items {items.uri}: the embedding that wrote them did not finish; run `rebeca embed` again"
        )
    return embed_dim, marker["clip"] if marker else None


def embeds_column(items: ParquetInput) -> pa.Schema:
    """Return the column of embeddings in the type that a read gives it. Raises as `check_columns` does."""
    instead = {"image": "run `rebeca embed` on them first"}
    columns = check_columns(items, schemas.embedded_items(1), instead=instead)
    return pa.schema([columns.field("image_embeds")])


def check_items_fit(uri: str, prior: JsonObject) -> None:
    """Raise InputError for real items with embeddings of another size or CLIP than the prior's."""
    items = open_parquet(uri, "items")
    embed_dim, clip = embedded_with(items)
    expected_dim = prior["scaler"]["embed_dim"]
    if embed_dim != expected_dim or (clip and prior["clip"] and clip != prior["clip"]):
        raise InputError(
            f"items {uri}: embeddings of size {embed_dim} by CLIP {clip}, "
            f"the prior knows size {expected_dim} by CLIP {prior['clip']}; "
            "give the items it was trained on, or leave `items` out"
        )
    check_image_embeds(items)
