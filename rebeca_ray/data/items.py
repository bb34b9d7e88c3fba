"""Items: embed images with open_clip in a Ray Data stage, and read embedded items back.

items (images) -> `embed_items` -> embedded items, in versions -> `open_items` -> `read_image_embeds`

A version lists its files, so that one with a few new items shares the files of the version before.
"""

import datetime
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rebeca_ray import schemas
from rebeca_ray.catalog.versions import ROOT, VERSIONS, current_version, replace_version
from rebeca_ray.config.jobs import EmbedConfig
from rebeca_ray.data.clip import EmbedImages, clip_fingerprint
from rebeca_ray.data.validation import check_columns, check_ids, check_rows
from rebeca_ray.errors import InputError, shown
from rebeca_ray.ray_runtime import ExcludeIds, require_room, start_ray, with_log
from rebeca_ray.storage.filesystem import arrow_filesystem, join, list_files, open_filesystem, sync_files
from rebeca_ray.storage.objects import JsonObject, read_json, write_json
from rebeca_ray.storage.parquet import ParquetInput, open_parquet
from rebeca_ray.storage.writable import require_own, require_writable

MARKER = "embedding.json"  # in a version: the CLIP that made the embeddings, their number, and their files
ROWS_AT_ONCE = 10_000
UNFINISHED: JsonObject = {"clip": None, "rows": None}


@dataclass(frozen=True, kw_only=True)
class EmbeddedItems:
    """I items: their ids [I] and embeddings [I, D] float32. `clip` is None without a marker beside them."""

    item_id: np.ndarray
    image_embeds: np.ndarray
    clip: str | None


def embed_items(config: EmbedConfig, *, only_new: bool = False, run_date: datetime.date | None = None) -> int:
    """Embed every item of `config.items`, and publish the embeddings as a new version of `config.out`.

    Returns how many items were embedded. `only_new` keeps the embeddings in `config.out` and adds items whose
    `item_id` is new. If another CLIP made the existing ones, all items are embedded again. The pointer
    records `run_date`, by default today in UTC. Raises LeaseHeldError if another process writes `config.out`.
    """
    source = open_parquet(config.items, "items")
    check_columns(source, schemas.ITEMS, instead={"image_embeds": "nothing is left to embed"})
    item_id = read_item_ids(source)
    if f"{config.items}/".startswith(f"{config.out.rstrip('/')}/"):
        raise InputError(
            f"out {config.out}: holds the items themselves and would be replaced; choose another folder"
        )
    require_own(config.out, "out", {"items.json": "fencing_token", MARKER: "clip"})
    fingerprint = clip_fingerprint(config.clip)
    require_writable(config.out, "out")
    with replace_version(config.out, "items", "embed") as version:
        # Embeddings of another CLIP cannot be compared with new ones, so only the same CLIP's are kept.
        marker = read_json(join(version.previous, MARKER)) or {}
        kept: np.ndarray | None = None
        files = list[str]()
        before = files_of(version.previous)
        if only_new and marker.get("clip") == fingerprint:
            kept, files = read_item_ids(open_items(version.previous)), before
            if np.isin(item_id, kept).all():
                return 0
        dataset = embed_images(config, source, kept)
        folder = version.begin(fingerprint)
        filesystem, path = open_filesystem(folder)
        dataset.write_parquet(path, filesystem=arrow_filesystem(filesystem))
        sync_files(folder)
        embedded = int(dataset.count())
        files = [*files, *files_of(folder)]
        meta = {
            "clip": fingerprint,
            "clip_name": config.clip,
            "rows": embedded + (0 if kept is None else len(kept)),
            "files": files,
        }
        write_json(meta, join(folder, MARKER))
        version.publish(
            run_date or datetime.datetime.now(datetime.UTC).date(),
            uses={version_of(file) for file in [*files, *before]},
        )
    return embedded


def embed_images(config: EmbedConfig, source: ParquetInput, kept: np.ndarray | None) -> Any:
    """Return the embedded items as a Ray Dataset in memory, without those whose ids are in `kept`."""
    start_ray()
    require_room(
        "num_actors",
        workers=config.num_actors,
        cpus=config.cpus_per_actor,
        device=config.device,
        spare_cpus=1,
    )
    import ray

    filesystem, _ = open_filesystem(config.items)
    items = ray.data.read_parquet(source.files, filesystem=arrow_filesystem(filesystem))
    if kept is not None:
        items = items.map_batches(ExcludeIds(pa.array(kept)), batch_format="pyarrow", batch_size=None)
    # A small file is one block, and one actor would embed it alone.
    blocks = items.repartition(target_num_rows_per_block=config.batch_size)
    return blocks.map_batches(
        with_log(EmbedImages),
        fn_constructor_args=(config.clip, config.device),
        batch_size=config.batch_size,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=config.num_actors),
        num_cpus=config.cpus_per_actor,
        num_gpus=1 if config.device == "cuda" else 0,
    ).materialize()


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
    column = items.read(["image_embeds"])["image_embeds"].combine_chunks()
    return EmbeddedItems(item_id=item_id, image_embeds=checked_embeds(column, item_id, uri), clip=clip)


def check_image_embeds(items: ParquetInput) -> None:
    """Raise the errors of `read_image_embeds` without holding all embeddings in memory."""
    embed_dim, _ = embedded_with(items)
    item_id = read_item_ids(items)
    start = 0
    for batch in items.batches(["image_embeds"], ROWS_AT_ONCE):
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
    table = items.read(["item_id"])
    check_rows(table, "items", items.uri)
    check_ids(table["item_id"], "items", items.uri, "item_id", unique="keep one row per item")
    return table["item_id"].to_numpy(zero_copy_only=False).astype(str)


def embedded_with(items: ParquetInput) -> tuple[int, str | None]:
    """Return D, from the schema or the first row, and the fingerprint of the CLIP, from the marker.

    The fingerprint is None if there is no marker. Raises InputError for a missing column, a first row without
    an embedding, and an embedding job that did not finish.
    """
    expected = schemas.embedded_items(1)
    check_columns(items, expected, instead={"image": "run `rebeca embed` on them first"})
    column = items.schema.field("image_embeds").type
    if pa.types.is_fixed_size_list(column):
        embed_dim = column.list_size
    else:
        first: Any = next((batch["image_embeds"] for batch in items.batches(["image_embeds"], 1)), [])
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
