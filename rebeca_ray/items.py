"""Items: images -> `image_embeds` with open_clip as a Ray Data stage, and embedded items read back."""

import hashlib
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from safetensors import SafetensorError, safe_open

from rebeca_ray import schemas
from rebeca_ray.config import EmbedConfig
from rebeca_ray.errors import UserError, did_you_mean
from rebeca_ray.storage import arrow_filesystem, join, open_filesystem, open_table, read_table, require_writable


@dataclass(frozen=True, kw_only=True)
class EmbeddedItems:
    """I items: ids [I], embeddings [I, D] float32, and which CLIP made them (None if the file does not say)."""

    item_id: np.ndarray
    image_embeds: np.ndarray
    clip: str | None


class EmbedImages:
    """Ray Data actor: encoded images in, CLIP image embeddings out; one row for one row.

    Adds `image_embeds` [D], not normalised, because that is what IP-Adapter was trained on, and drops `image`.
    """

    def __init__(self, clip: str, batch_size: int, device: str) -> None:
        import torch

        self.torch, self.device = torch, device
        self.model, self.preprocess = load_clip(clip)
        self.model = self.model.eval().to(device)
        self.batch_size = batch_size

    def __call__(self, batch: pa.Table) -> pa.Table:
        from PIL import Image

        encoded = batch["image"].combine_chunks().field("bytes")
        images = [self.preprocess(Image.open(io.BytesIO(value.as_py())).convert("RGB")) for value in encoded]
        with self.torch.inference_mode():
            embeds = self.model.encode_image(self.torch.stack(images).to(self.device), normalize=False).float().cpu().numpy()
        assert len(embeds) == batch.num_rows
        column = pa.FixedSizeListArray.from_arrays(pa.array(embeds.ravel()), type=schemas.image_embeds(embeds.shape[1]))
        return batch.drop_columns(["image"]).append_column("image_embeds", column)


def load_clip(name: str) -> tuple[Any, Any]:
    """An open_clip model and its own evaluation preprocessing.

    `name` is `local-dir:DIR`, `hf-hub:REPO`, or `ARCHITECTURE/PRETRAINED-TAG` (`ViT-H-14/laion2b_s32b_b79k`).
    Raises UserError if open_clip does not know it.
    """
    import open_clip

    schemed = name.startswith(("local-dir:", "hf-hub:"))
    architecture, tag = (name, None) if schemed else name.split("/", 1) if "/" in name else (name, "")
    if not schemed and not tag:
        raise UserError(f"clip {name!r}: names no weights; give local-dir:DIR, hf-hub:REPO or ARCHITECTURE/TAG")
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
        raise UserError(f"clip {name!r}: {folder} is damaged ({type(error).__name__}: {error}); save it again with open_clip") from None
    return digest.hexdigest()[:16]


def embed_items(config: EmbedConfig) -> int:
    """Embed every item of `config.items` and write `config.out` (a folder of Parquet files); returns the row count."""
    import ray

    files, schema = open_table(config.items, "items")
    for name in ("item_id", "image"):
        if name not in schema.names:
            raise UserError(f"items {config.items}: column {name!r} is missing; {did_you_mean(name, schema.names)}")
    fingerprint = clip_fingerprint(config.clip)
    require_writable(config.out, "out")
    filesystem, _ = open_filesystem(config.items)
    out_filesystem, out_path = open_filesystem(config.out)
    if out_filesystem.exists(out_path):
        out_filesystem.rm(out_path, recursive=True)

    dataset = (
        ray.data.read_parquet(files, filesystem=arrow_filesystem(filesystem))
        .repartition(target_num_rows_per_block=config.batch_size)  # a small file is one block, which one actor would get
        .map_batches(
            EmbedImages,
            fn_constructor_args=(config.clip, config.batch_size, config.device),
            batch_size=config.batch_size,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=config.num_actors),
            num_cpus=config.cpus_per_actor,
            num_gpus=1 if config.device == "cuda" else 0,
        )
        .materialize()
    )
    dataset.write_parquet(out_path, filesystem=arrow_filesystem(out_filesystem))
    meta = {"clip": fingerprint, "clip_name": config.clip, "rows": dataset.count()}
    out_filesystem.pipe_file(join(out_path, "embedding.json"), json.dumps(meta, indent=2).encode())
    return int(meta["rows"])


def read_image_embeds(uri: str) -> EmbeddedItems:
    """All embedded items of `uri` in memory. Raises UserError for a missing column, nulls or repeated ids."""
    _, schema = open_table(uri, "items")
    if "image_embeds" not in schema.names:
        remedy = "run `rebeca embed` on them first" if "image" in schema.names else did_you_mean("image_embeds", schema.names)
        raise UserError(f"items {uri}: column 'image_embeds' is missing; {remedy}")
    table = read_table(uri, "items", ["item_id", "image_embeds"])
    column = table["image_embeds"].combine_chunks()
    if column.null_count or not (pa.types.is_fixed_size_list(column.type) or pa.types.is_list(column.type)):
        raise UserError(
            f"items {uri}: image_embeds is {column.type} with {column.null_count} nulls; expected fixed_size_list<float32>[D] without nulls"
        )
    values = column.flatten().to_numpy(zero_copy_only=False).astype(np.float32)
    if table.num_rows == 0 or len(values) % table.num_rows:
        raise UserError(f"items {uri}: {len(values)} embedding values for {table.num_rows} items; every item needs the same D")
    item_id = table["item_id"].to_numpy(zero_copy_only=False).astype(str)
    if len(np.unique(item_id)) != len(item_id):
        raise UserError(f"items {uri}: {len(item_id) - len(np.unique(item_id))} item_ids are repeated; keep one row an item")
    filesystem, path = open_filesystem(uri)
    marker = join(path, "embedding.json")
    clip = json.loads(filesystem.cat_file(marker))["clip"] if filesystem.exists(marker) else None
    return EmbeddedItems(item_id=item_id, image_embeds=values.reshape(len(item_id), -1), clip=clip)
