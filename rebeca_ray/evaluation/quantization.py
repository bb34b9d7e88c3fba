"""Export a decoder whose UNet computes in int8, and keep it only if its images are as good.

items -> float32 export -> int8 UNet -> images of both -> cosine to the given embeddings -> export

NNCF chooses the ranges of all activations from the UNet's inputs while it draws some items. Both ONNX Runtime
and OpenVINO run the graph.
"""

import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from rebeca_ray.catalog.versions import current_version
from rebeca_ray.config.decoder import DecoderSettings
from rebeca_ray.data.clip import EmbedImages
from rebeca_ray.data.items import MARKER, read_image_embeds
from rebeca_ray.decoder.export import export_decoder
from rebeca_ray.decoder.files import hash_file
from rebeca_ray.decoder.interface import Rows
from rebeca_ray.decoder.local import LocalDecoder
from rebeca_ray.errors import InputError, QualityGateError
from rebeca_ray.storage.filesystem import join
from rebeca_ray.storage.objects import read_json

log = logging.getLogger(__name__)

NUM_ITEMS = 32  # for the ranges, and as many others for the comparison
MAX_DROP = 0.004  # of the mean cosine


@dataclass(frozen=True, kw_only=True)
class Cosines:
    """Mean cosines between given embeddings and those of the images drawn from them."""

    float32: float
    int8: float


def export_quantized(settings: DecoderSettings, out: Path, items: str) -> Cosines:
    """Write an export with an int8 UNet to `out`; `items` is a folder of embedded items.

    Raises InputError for unusable items or a missing package, and QualityGateError if the mean cosine falls
    by more than MAX_DROP. `out` appears once all is well.
    """
    require_nncf()
    if out.exists():
        raise InputError(f"--out {out}: already exists; remove it, or give another folder")
    ranges_ND, compared_ND, embed = calibration(items)
    draft = out.with_name(f".{out.name}.int8")
    shutil.rmtree(draft, ignore_errors=True)
    try:
        exact = settings.model_copy(update={"dtype": "float32", "device": "cpu"})
        export_decoder(exact, draft)
        quantize(exact, draft, ranges_ND)
        quantized = exact.model_copy(update={"engine": "onnx", "engine_dir": str(draft), "dtype": "int8"})
        cosines = Cosines(
            float32=mean_cosine(exact, compared_ND, embed), int8=mean_cosine(quantized, compared_ND, embed)
        )
        if cosines.float32 - cosines.int8 > MAX_DROP:
            raise QualityGateError(
                f"export --int8: the mean cosine to the given embeddings falls from {cosines.float32:.4f} to "
                f"{cosines.int8:.4f}, at most {MAX_DROP} is allowed; nothing is written; "
                "export without --int8"
            )
        draft.rename(out)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return cosines


def require_nncf() -> None:
    try:
        import onnxruntime  # noqa: F401

        # Unset, NNCF reports each use to its makers.
        os.environ.setdefault("NNCF_CI", "1")
        import nncf
    except ImportError:
        raise InputError(
            "export --int8: the packages nncf and onnxruntime are missing; "
            "run `pip install 'rebeca-ray[onnx,openvino]'`"
        ) from None
    nncf.set_log_level(logging.WARNING)


def calibration(items: str) -> tuple[np.ndarray, np.ndarray, EmbedImages]:
    """Return two disjoint sets of embeddings [N, D], and the CLIP that made them."""
    embedded = read_image_embeds(items)
    marker = read_json(join(current_version(items, "items"), MARKER)) or {}
    if "clip_name" not in marker:
        raise InputError(
            f"--calibrate {items}: names no CLIP in {MARKER}; give a folder that `rebeca embed` wrote"
        )
    if len(embedded.item_id) < 2 * NUM_ITEMS:
        raise InputError(
            f"--calibrate {items}: {len(embedded.item_id)} items, expected at least {2 * NUM_ITEMS}; "
            "embed more"
        )
    chosen = np.linspace(0, len(embedded.item_id) - 1, 2 * NUM_ITEMS).astype(int)
    embeds = embedded.image_embeds[chosen]
    return embeds[::2], embeds[1::2], EmbedImages(marker["clip_name"], "cpu", "#ffffff")


def quantize(settings: DecoderSettings, folder: Path, embeds_ND: np.ndarray) -> None:
    """Replace the UNet in an export by one with int8 weights and activations, and describe it."""
    import nncf
    import onnx

    calls = list(unet_inputs(settings, embeds_ND))
    graph = folder / "unet.onnx"
    quantized = nncf.quantize(onnx.load(graph), nncf.Dataset(calls), subset_size=len(calls))
    for path in (graph, folder / "unet.onnx.data"):
        path.unlink(missing_ok=True)
    onnx.save(quantized, graph, save_as_external_data=True, location="unet.onnx.data")
    description = json.loads((folder / "decoder.json").read_text())
    names = [name for name in description["files"] if not name.startswith("unet.onnx")]
    names += [path.name for path in folder.glob("unet.onnx*")]
    description |= {
        "dtype": "int8",
        "files": {name: (folder / name).stat().st_size for name in sorted(names)},
        "sha256": {name: hash_file(folder / name) for name in sorted(names)},
    }
    # Other calibration makes other images, so the graph is a part of the decoder's identity.
    weights = {f"int8/{path.name}": hash_file(path) for path in folder.glob("unet.onnx*")}
    description["weights"] = dict(sorted({**description["weights"], **weights}.items()))
    (folder / "decoder.json").write_text(json.dumps(description, indent=2))


def unet_inputs(settings: DecoderSettings, embeds_ND: np.ndarray) -> Iterator[dict[str, np.ndarray]]:
    """Yield the inputs of every pass of the UNet while it draws from the embeddings."""
    decoder = LocalDecoder(settings)
    networks, calls = decoder.loop.networks, []
    names = networks.family.signatures(deep_cache=False)["unet"].inputs

    def unet(*inputs: Any) -> Any:
        calls.append({name: value.numpy().copy() for name, value in zip(names, inputs, strict=True)})
        return networks.unet(*inputs)

    decoder.loop.networks = replace(networks, unet=unet)
    for start in range(0, len(embeds_ND), settings.batch_size):
        tile = embeds_ND[start : start + settings.batch_size]
        decoder.draw(Rows.of(settings, tile, range(len(tile))))
        yield from calls
        calls.clear()


def mean_cosine(settings: DecoderSettings, embeds_ND: np.ndarray, embed: EmbedImages) -> float:
    """Return the mean cosine between embeddings and their images; a row without an image counts -1."""
    drawn = LocalDecoder(settings).draw(Rows.of(settings, embeds_ND, range(len(embeds_ND))))
    return float(np.mean(list(cosines(drawn, embeds_ND, embed))))


def cosines(drawn: Iterable[np.ndarray | str], embeds_ND: np.ndarray, embed: EmbedImages) -> Iterator[float]:
    for image, given_D in zip(drawn, embeds_ND, strict=True):
        if isinstance(image, str):
            yield -1.0
            continue
        seen_D = embed.encode([Image.fromarray(image)])[0]
        yield float(seen_D @ given_D / np.linalg.norm(seen_D) / np.linalg.norm(given_D))
