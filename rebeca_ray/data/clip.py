"""CLIP by open_clip: load a model, fingerprint its weights, embed images."""

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from safetensors import SafetensorError, safe_open

from rebeca_ray import schemas
from rebeca_ray.errors import InputError, describe, did_you_mean, shown


class EmbedImages:
    """Embed images as a Ray Data actor: a batch of encoded images in, one embedding per row out.

    Returns `item_id` and `image_embeds` [D]. Embeddings are not normalised, as IP-Adapter was trained on.
    Raises InputError, naming the item, for an image that cannot be decoded.
    """

    def __init__(self, clip: str, device: str) -> None:
        import torch

        self.torch, self.device = torch, device
        self.model, self.preprocess = load_clip(clip)
        self.model = self.model.eval().to(device)

    def __call__(self, batch: pa.Table) -> pa.Table:
        encoded = pc.struct_field(batch["image"], "bytes")  # null where the whole struct is null
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
        return pa.table({"item_id": batch["item_id"], "image_embeds": column})


def open_image(encoded: bytes | None, item_id: pa.Scalar) -> Any:
    """Decode the image of one item to RGB. Raises InputError, naming the item."""
    from PIL import Image, UnidentifiedImageError

    try:
        return Image.open(io.BytesIO(encoded or b"")).convert("RGB")
    except Exception as error:  # decoders raise errors of any type for a broken file
        why = "not an image" if isinstance(error, UnidentifiedImageError) else describe(error)
        raise InputError(
            f"items: the image of {shown(item_id.as_py())} cannot be decoded ({why}); mend or drop that item"
        ) from None


def load_clip(name: str) -> tuple[Any, Any]:
    """Return an open_clip model and its own evaluation preprocessing.

    `name` is `local-dir:DIR`, `hf-hub:REPO`, or `ARCHITECTURE/PRETRAINED-TAG` (`ViT-H-14/laion2b_s32b_b79k`).
    Raises InputError if open_clip cannot load it.
    """
    import open_clip

    schemed = name.startswith(("local-dir:", "hf-hub:"))
    architecture, tag = (name, None) if schemed else name.split("/", 1) if "/" in name else (name, "")
    if not schemed and not tag:
        raise InputError(
            f"clip {name!r}: names no weights; give local-dir:DIR, hf-hub:REPO or ARCHITECTURE/TAG"
        )
    if not schemed and architecture not in open_clip.list_models():
        raise InputError(
            f"clip {name!r}: unknown architecture; {did_you_mean(architecture, open_clip.list_models())}"
        )
    try:
        model, _, preprocess = open_clip.create_model_and_transforms(architecture, pretrained=tag)
    except (FileNotFoundError, RuntimeError, ValueError, OSError) as error:
        raise InputError(f"clip {name!r}: cannot be loaded ({' '.join(str(error).split())[:200]})") from None
    return model, preprocess


def clip_fingerprint(name: str) -> str:
    """Return 16 hex digits for a CLIP: a hash of the files of a local directory, otherwise of the name.

    Raises InputError in the driver for a CLIP that would fail in every actor.
    """
    if not name.startswith("local-dir:"):
        load_clip(name)  # downloads it once, before every actor would
        return hashlib.sha256(name.encode()).hexdigest()[:16]
    folder = Path(name.removeprefix("local-dir:"))
    digest = hashlib.sha256()
    for file in ("open_clip_config.json", "open_clip_model.safetensors"):
        if not (folder / file).is_file():
            raise InputError(f"clip {name!r}: {file} is not in {folder}; give a directory saved by open_clip")
        digest.update((folder / file).read_bytes())
    try:
        json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]["embed_dim"]
        with safe_open(folder / "open_clip_model.safetensors", framework="numpy"):
            pass
    except (ValueError, KeyError, TypeError, SafetensorError) as error:
        raise InputError(
            f"clip {name!r}: {folder} is damaged ({type(error).__name__}: {error}); "
            "save it again with open_clip"
        ) from None
    return digest.hexdigest()[:16]
