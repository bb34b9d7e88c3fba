"""Items: images -> `image_embeds` with open_clip as a Ray Data stage, and embedded items read back."""

import hashlib
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from safetensors import SafetensorError, safe_open

from rebeca_ray import schemas
from rebeca_ray.config.jobs import EmbedConfig
from rebeca_ray.errors import UserError, describe, did_you_mean, shown
from rebeca_ray.ray_runtime import WithoutThose, require_room, start_ray
from rebeca_ray.storage.filesystem import UNREACHABLE, arrow_filesystem, delete, join, open_filesystem
from rebeca_ray.storage.objects import read_json, write_json
from rebeca_ray.storage.parquet import open_table, read_table
from rebeca_ray.storage.writable import require_own, require_writable
from rebeca_ray.tables import check_columns, check_ids, check_rows

MARKER = "embedding.json"  # beside embedded items: how many, and by which CLIP
ROWS_AT_ONCE = 10_000
UNFINISHED: dict[str, Any] = {"clip": None, "rows": None}


@dataclass(frozen=True, kw_only=True)
class EmbeddedItems:
    """I items: ids [I], embeddings [I, D] float32, and which CLIP made them (None if the file does not say)."""

    item_id: np.ndarray
    image_embeds: np.ndarray
    clip: str | None


class EmbedImages:
    """Ray Data actor: encoded images in, CLIP image embeddings out; one row for one row.

    Adds `image_embeds` [D], not normalised, because that is what IP-Adapter was trained on, and drops `image`.
    Raises UserError, naming the item, for an image that cannot be decoded.
    """

    def __init__(self, clip: str, device: str) -> None:
        import torch

        self.torch, self.device = torch, device
        self.model, self.preprocess = load_clip(clip)
        self.model = self.model.eval().to(device)

    def __call__(self, batch: pa.Table) -> pa.Table:
        encoded = pc.struct_field(batch["image"], "bytes")  # null where the whole image is
        images = [
            self.preprocess(open_image(value, item))
            for value, item in zip(encoded.to_pylist(), batch["item_id"], strict=True)
        ]
        with self.torch.inference_mode():
            embeds = (
                self.model.encode_image(self.torch.stack(images).to(self.device), normalize=False)
                .float()
                .cpu()
                .numpy()
            )
        assert len(embeds) == batch.num_rows
        column = pa.FixedSizeListArray.from_arrays(
            pa.array(embeds.ravel()), type=schemas.image_embeds(embeds.shape[1])
        )
        kept = [name for name in batch.column_names if name not in ("image", "image_embeds")]
        return batch.select(kept).append_column("image_embeds", column)


def open_image(encoded: bytes | None, item_id: pa.Scalar) -> Any:
    """The RGB picture of one item."""
    from PIL import Image, UnidentifiedImageError

    try:
        return Image.open(io.BytesIO(encoded or b"")).convert("RGB")
    except Exception as error:  # a broken file makes the decoders raise anything
        why = "not an image" if isinstance(error, UnidentifiedImageError) else describe(error)
        raise UserError(
            f"items: the image of {shown(item_id.as_py())} cannot be decoded ({why}); mend or drop that item"
        ) from None


def load_clip(name: str) -> tuple[Any, Any]:
    """An open_clip model and its own evaluation preprocessing.

    `name` is `local-dir:DIR`, `hf-hub:REPO`, or `ARCHITECTURE/PRETRAINED-TAG` (`ViT-H-14/laion2b_s32b_b79k`).
    Raises UserError if open_clip does not know it.
    """
    import open_clip

    schemed = name.startswith(("local-dir:", "hf-hub:"))
    architecture, tag = (name, None) if schemed else name.split("/", 1) if "/" in name else (name, "")
    if not schemed and not tag:
        raise UserError(
            f"clip {name!r}: names no weights; give local-dir:DIR, hf-hub:REPO or ARCHITECTURE/TAG"
        )
    if not schemed and architecture not in open_clip.list_models():
        raise UserError(
            f"clip {name!r}: unknown architecture; {did_you_mean(architecture, open_clip.list_models())}"
        )
    try:
        model, _, preprocess = open_clip.create_model_and_transforms(architecture, pretrained=tag)
    except (FileNotFoundError, RuntimeError, ValueError, OSError) as error:
        raise UserError(f"clip {name!r}: cannot be loaded ({' '.join(str(error).split())[:200]})") from None
    return model, preprocess


def clip_fingerprint(name: str) -> str:
    """16 hex digits for a CLIP: of the weights and config of a local directory, else of its name.

    Raises UserError, in the driver, for what would fail in every actor.
    """
    if not name.startswith("local-dir:"):
        load_clip(name)  # downloads it once, before the actors look for it
        return hashlib.sha256(name.encode()).hexdigest()[:16]
    folder = Path(name.removeprefix("local-dir:"))
    digest = hashlib.sha256()
    for file in ("open_clip_config.json", "open_clip_model.safetensors"):
        if not (folder / file).is_file():
            raise UserError(f"clip {name!r}: {file} is not in {folder}; give a directory saved by open_clip")
        digest.update((folder / file).read_bytes())
    try:
        json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]["embed_dim"]
        with safe_open(folder / "open_clip_model.safetensors", framework="numpy"):
            pass
    except (ValueError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(
            f"clip {name!r}: {folder} is damaged ({type(error).__name__}: {error}); save it again with open_clip"
        ) from None
    return digest.hexdigest()[:16]


def embed_items(config: EmbedConfig, *, only_new: bool = False) -> int:
    """Embed every item of `config.items` and write `config.out` (a folder of Parquet files); returns how many were embedded.

    `only_new` keeps what is there already and adds items whose `item_id` is not, unless another CLIP made it: then all is embedded.
    """
    check_columns(config.items, "items", schemas.ITEMS, instead={"image_embeds": "nothing is left to embed"})
    read_item_ids(config.items)
    files, _ = open_table(config.items, "items")
    if f"{config.items}/".startswith(f"{config.out.rstrip('/')}/"):
        raise UserError(
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
            WithoutThose(ray.put(pa.array(kept))), batch_format="pyarrow", batch_size=None
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
    except (pa.ArrowException, *UNREACHABLE) as error:
        raise UserError(f"items {uri}: not readable as Parquet ({describe(error)}); write it again") from None


def checked_embeds(column: pa.Array, item_id: np.ndarray, uri: str) -> np.ndarray:
    """The embeddings in a column as an array. Raises UserError for any that is missing, of another size, zero or not finite."""
    if column.null_count:
        raise UserError(
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
        raise UserError(
            f"items {uri}: {bad.sum()} of {len(bad)} image_embeds are zero or not finite ({names}); embed those items again"
        )
    return values


def several_sizes(uri: str, sizes: list[int]) -> UserError:
    return UserError(
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
        raise UserError(f"items {uri}: the first row has no image_embeds; drop it, or embed the items again")
    marker = read_json(join(uri, MARKER))
    if marker == UNFINISHED:
        raise UserError(
            f"items {uri}: the embedding that wrote them did not finish; run `rebeca embed` again"
        )
    return embed_dim, marker["clip"] if marker else None


def check_items_fit(items: str, prior: dict[str, Any]) -> None:
    """Raise UserError for real items that the prior's embeddings cannot be compared with."""
    embed_dim, clip = embedded_with(items)
    wanted = prior["scaler"]["embed_dim"]
    if embed_dim != wanted or (clip and prior["clip"] and clip != prior["clip"]):
        raise UserError(
            f"items {items}: embeddings of size {embed_dim} by CLIP {clip}, the prior knows size {wanted} by CLIP {prior['clip']}; "
            "give the items it was trained on, or leave `items` out"
        )
    check_image_embeds(items)
