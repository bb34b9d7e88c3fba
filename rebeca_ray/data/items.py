"""Items: images -> `image_embeds` with open_clip as a Ray Data stage, and embedded items read back."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rebeca_ray import schemas
from rebeca_ray.config.jobs import EmbedConfig
from rebeca_ray.data.clip import EmbedImages, clip_fingerprint
from rebeca_ray.data.validation import check_columns, check_ids, check_rows
from rebeca_ray.errors import InputError, UserError, describe, shown
from rebeca_ray.ray_runtime import ExcludeIds, require_room, start_ray
from rebeca_ray.storage.filesystem import arrow_filesystem, delete, join, open_filesystem
from rebeca_ray.storage.objects import read_json, write_json
from rebeca_ray.storage.parquet import open_table, read_table
from rebeca_ray.storage.store import failure_types
from rebeca_ray.storage.writable import require_own, require_writable

MARKER = "embedding.json"  # beside embedded items: how many, and by which CLIP
ROWS_AT_ONCE = 10_000
UNFINISHED: dict[str, Any] = {"clip": None, "rows": None}


@dataclass(frozen=True, kw_only=True)
class EmbeddedItems:
    """I items: ids [I], embeddings [I, D] float32, and which CLIP made them (None if the file does not say)."""

    item_id: np.ndarray
    image_embeds: np.ndarray
    clip: str | None


def embed_items(config: EmbedConfig, *, only_new: bool = False) -> int:
    """Embed every item of `config.items` and write `config.out` (a folder of Parquet files); returns how many were embedded.

    `only_new` keeps what is there already and adds items whose `item_id` is not, unless another CLIP made it: then all is embedded.
    """
    check_columns(config.items, "items", schemas.ITEMS, instead={"image_embeds": "nothing is left to embed"})
    read_item_ids(config.items)
    files, _ = open_table(config.items, "items")
    if f"{config.items}/".startswith(f"{config.out.rstrip('/')}/"):
        raise InputError(
            f"out {config.out}: holds the items themselves and would be replaced; choose another folder"
        )
    filesystem, _ = open_filesystem(config.items)
    out_filesystem, out_path = open_filesystem(config.out)
    require_own(config.out, "out", MARKER, "clip")
    fingerprint = clip_fingerprint(config.clip)
    require_writable(config.out, "out")
    kept = (
        read_item_ids(config.out)
        if only_new and (read_json(join(config.out, MARKER)) or {}).get("clip") == fingerprint
        else None
    )
    if kept is not None and np.isin(read_item_ids(config.items), kept).all():
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

    items = ray.data.read_parquet(files, filesystem=arrow_filesystem(filesystem))
    if kept is not None:
        items = items.map_batches(
            ExcludeIds(ray.put(pa.array(kept))), batch_format="pyarrow", batch_size=None
        )
    dataset = (
        items.repartition(
            target_num_rows_per_block=config.batch_size
        )  # a small file is one block, which one actor would get
        .map_batches(
            EmbedImages,
            fn_constructor_args=(config.clip, config.device),
            batch_size=config.batch_size,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=config.num_actors),
            num_cpus=config.cpus_per_actor,
            num_gpus=1 if config.device == "cuda" else 0,
        )
        .materialize()
    )
    if kept is None:
        delete(config.out)  # only now that the new ones are complete
    write_json(UNFINISHED, join(config.out, MARKER))  # a crash from here on makes the next run embed all
    dataset.write_parquet(out_path, filesystem=arrow_filesystem(out_filesystem))
    embedded = dataset.count()
    meta = {
        "clip": fingerprint,
        "clip_name": config.clip,
        "rows": embedded + (0 if kept is None else len(kept)),
    }
    write_json(meta, join(config.out, MARKER))
    return embedded


def read_image_embeds(uri: str) -> EmbeddedItems:
    """All embedded items of `uri` in memory.

    Raises UserError for a missing column, nulls, repeated ids, and embeddings that are zero or not finite.
    """
    _, clip = embedded_with(uri)
    item_id = read_item_ids(uri)
    column = read_table(uri, "items", ["image_embeds"])["image_embeds"].combine_chunks()
    return EmbeddedItems(item_id=item_id, image_embeds=checked_embeds(column, item_id, uri), clip=clip)


def check_image_embeds(uri: str) -> None:
    """Raise the UserError of `read_image_embeds`, without ever having all of it in memory."""
    embed_dim, _ = embedded_with(uri)
    item_id = read_item_ids(uri)
    start = 0
    for column in embeds_in_batches(uri, ROWS_AT_ONCE):
        values = checked_embeds(column, item_id[start : start + len(column)], uri)
        start += len(column)
        if values.shape[1] != embed_dim:
            raise several_sizes(uri, [embed_dim, values.shape[1]])


def embeds_in_batches(uri: str, rows: int) -> Iterator[pa.Array]:
    files, _ = open_table(uri, "items")
    filesystem, _ = open_filesystem(uri)
    try:
        for name in files:
            with filesystem.open(name, "rb") as file:
                for batch in pq.ParquetFile(file).iter_batches(rows, columns=["image_embeds"]):
                    yield batch["image_embeds"]
    except (pa.ArrowException, *failure_types()) as error:
        raise InputError(
            f"items {uri}: not readable as Parquet ({describe(error)}); write it again"
        ) from None


def checked_embeds(column: pa.Array, item_id: np.ndarray, uri: str) -> np.ndarray:
    """The embeddings in a column as an array. Raises UserError for any that is missing, of another size, zero or not finite."""
    if column.null_count:
        raise InputError(
            f"items {uri}: {column.null_count} of {len(column)} image_embeds are null; embed those items again"
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
            f"items {uri}: {bad.sum()} of {len(bad)} image_embeds are zero or not finite ({names}); embed those items again"
        )
    return values


def several_sizes(uri: str, sizes: list[int]) -> UserError:
    return InputError(
        f"items {uri}: image_embeds has rows of {len(sizes)} sizes ({sizes[:3]}); every item needs the same D"
    )


def read_item_ids(uri: str) -> np.ndarray:
    """The ids of all items, in the order of their embeddings. Raises UserError for none, and for one that is no id or repeated."""
    table = read_table(uri, "items", ["item_id"])
    check_rows(table, "items", uri)
    check_ids(table["item_id"], "items", uri, "item_id", unique="keep one row an item")
    return table["item_id"].to_numpy(zero_copy_only=False).astype(str)


def embedded_with(uri: str) -> tuple[int, str | None]:
    """`(D, fingerprint of the CLIP)` of embedded items, read from the first row and the marker; None if there is no marker."""
    expected = schemas.embedded_items(1)
    check_columns(uri, "items", expected, instead={"image": "run `rebeca embed` on them first"})
    _, schema = open_table(uri, "items")
    column = schema.field("image_embeds").type
    if pa.types.is_fixed_size_list(column):
        embed_dim = column.list_size
    else:
        first: Any = next(embeds_in_batches(uri, 1), [])
        embed_dim = len(first[0]) if len(first) and first[0].is_valid else 0
    if not embed_dim:
        raise InputError(f"items {uri}: the first row has no image_embeds; drop it, or embed the items again")
    marker = read_json(join(uri, MARKER))
    if marker == UNFINISHED:
        raise InputError(
            f"items {uri}: the embedding that wrote them did not finish; run `rebeca embed` again"
        )
    return embed_dim, marker["clip"] if marker else None


def check_items_fit(items: str, prior: dict[str, Any]) -> None:
    """Raise UserError for real items that the prior's embeddings cannot be compared with."""
    embed_dim, clip = embedded_with(items)
    wanted = prior["scaler"]["embed_dim"]
    if embed_dim != wanted or (clip and prior["clip"] and clip != prior["clip"]):
        raise InputError(
            f"items {items}: embeddings of size {embed_dim} by CLIP {clip}, the prior knows size {wanted} by CLIP {prior['clip']}; "
            "give the items it was trained on, or leave `items` out"
        )
    check_image_embeds(items)
