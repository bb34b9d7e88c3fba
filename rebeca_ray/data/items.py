"""Embedded items: open a version of them, and read ids and embeddings.

embedding.py -> embedded items, in versions -> `open_items` -> `read_image_embeds`

A version lists its files, so that one with a few new items shares the files of the version before.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rebeca_ray import schemas
from rebeca_ray.catalog.versions import ROOT, VERSIONS, current_version
from rebeca_ray.data.validation import check_columns, check_ids, check_rows
from rebeca_ray.errors import InputError, shown
from rebeca_ray.storage.filesystem import join, list_files
from rebeca_ray.storage.objects import JsonObject, read_json
from rebeca_ray.storage.parquet import ParquetInput, open_parquet

MARKER = "embedding.json"  # in a version: the CLIP that made the embeddings, their number, and their files
ROWS_AT_ONCE = 10_000
UNFINISHED: JsonObject = {"clip": None, "rows": None}  # the marker of an older version that was killed


@dataclass(frozen=True, kw_only=True)
class EmbeddedItems:
    """I items: ids [I] of str, embeddings [I, D] float32. `clip` is None without a marker beside them."""

    item_id: np.ndarray
    image_embeds: np.ndarray
    clip: str | None


def files_of(folder: str) -> list[str]:
    """Return the Parquet files of a version, below the folder of all versions, sorted.

    A version in the root has all files of the root, but none of the versions below it.
    """
    root, separator, _ = folder.rpartition(f"/{VERSIONS}/")
    if (marker := read_json(join(folder, MARKER))) and "files" in marker:
        return list(marker["files"])
    start = f"{(root if separator else folder).rstrip('/')}/"
    files = [uri.removeprefix(start) for uri in list_files(folder, ".parquet")]
    return [file for file in files if separator or version_of(file) == ROOT]


def version_of(file: str) -> str:
    """Return the name of the version that wrote a file of `files_of`."""
    return file.split("/")[1] if file.startswith(f"{VERSIONS}/") else ROOT


def open_items(uri: str) -> ParquetInput:
    """Open embedded items: the published version of a folder, one version, or any Parquet files.

    Raises as `open_parquet` does.
    """
    folder = current_version(uri, "items")
    root, separator, _ = folder.rpartition(f"/{VERSIONS}/")
    return open_parquet(
        folder, "items", files=[join(root, file) for file in files_of(folder)] if separator else None
    )


def read_image_embeds(uri: str) -> EmbeddedItems:
    """Read all embedded items of `uri` into memory.

    Raises InputError for a missing column, nulls, repeated ids, and embeddings that are zero or not finite.
    """
    items = open_items(uri)
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
    items = open_items(uri)
    embed_dim, clip = embedded_with(items)
    expected_dim = prior["scaler"]["embed_dim"]
    if embed_dim != expected_dim or (clip and prior["clip"] and clip != prior["clip"]):
        raise InputError(
            f"items {uri}: embeddings of size {embed_dim} by CLIP {clip}, "
            f"the prior knows size {expected_dim} by CLIP {prior['clip']}; "
            "give the items it was trained on, or leave `items` out"
        )
    check_image_embeds(items)
