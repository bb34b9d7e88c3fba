"""CLIP by open_clip: load a model, fingerprint its weights, embed images."""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image
from safetensors import SafetensorError, safe_open

from rebeca_ray import schemas
from rebeca_ray.errors import InputError, did_you_mean
from rebeca_ray.pixels import see_image
from rebeca_ray.watchdog import Pulse

READING = "as a person sees them"  # in the fingerprint; change it whenever `see_image` sees another picture
ERROR = "rebeca_image_error"  # the column with the reason why an image cannot be read, or null


class EmbedImages:
    """Embed images as a Ray Data actor: a batch of encoded images in, one embedding per row out.

    Returns `item_id`, `image_embeds` [D] and ERROR. Embeddings are not normalised, as IP-Adapter was trained
    on. An image that cannot be read has the embedding of a blank one beside its error.
    """

    def __init__(self, clip: str, device: str, background: str, pulse: Pulse | None = None) -> None:
        import torch

        self.torch, self.device, self.background, self.pulse = torch, device, background, pulse
        self.model, self.preprocess = load_clip(clip)
        # A convolutional CLIP is a fifth faster so on a CPU.
        self.model = self.model.eval().to(device, memory_format=torch.channels_last)

    def __call__(self, batch: pa.Table) -> pa.Table:
        embedded = embed_batch(batch, self.background, self.encode)
        if self.pulse:
            self.pulse.beat(batch.num_rows)
        return embedded

    def encode(self, images: Sequence[Image.Image]) -> np.ndarray:
        """Return the embeddings [B, D] of RGB images."""
        pixels = self.torch.stack([self.preprocess(image) for image in images]).to(self.device)
        with self.torch.inference_mode():
            return self.model.encode_image(pixels, normalize=False).float().cpu().numpy()


def embed_batch(
    batch: pa.Table, background: str, encode: Callable[[Sequence[Image.Image]], np.ndarray]
) -> pa.Table:
    """Return `item_id`, `image_embeds` [D] and ERROR of a batch of encoded images.

    `encode` takes RGB images.
    """
    read = [read_image(value, background) for value in batch["image"].to_pylist()]
    embeds = encode([image for image, _ in read])
    assert len(embeds) == batch.num_rows
    column = pa.FixedSizeListArray.from_arrays(
        pa.array(embeds.ravel()), type=schemas.image_embeds(embeds.shape[1])
    )
    errors = pa.array([error for _, error in read], pa.string())
    return pa.table({"item_id": batch["item_id"], "image_embeds": column, ERROR: errors})


def read_image(value: dict[str, Any] | None, background: str) -> tuple[Image.Image, str | None]:
    """Return the picture in one value of a column `image`, or a blank one and the reason."""
    try:
        if value is None:
            raise InputError("is null")
        encoded = value.get("bytes")
        if encoded is None and value.get("path"):
            raise InputError("has a path alone and null bytes; write the file's content into `bytes`")
        if not encoded:
            raise InputError("has no bytes")
        return see_image(encoded, background), None
    except InputError as error:
        return Image.new("RGB", (8, 8)), str(error)


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


def clip_fingerprint(name: str, background: str = "#ffffff") -> str:
    """Return 16 hex digits for a CLIP, the rule by which its images are read, and their background.

    A CLIP in a local directory is known by its files, any other by its name. Raises InputError in the driver
    for a CLIP that would fail in every actor.
    """
    digest = hashlib.sha256(f"{READING}\0{background}\0".encode())
    if not name.startswith("local-dir:"):
        load_clip(name)  # downloads it once, before every actor would
        digest.update(name.encode())
        return digest.hexdigest()[:16]
    folder = Path(name.removeprefix("local-dir:"))
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
