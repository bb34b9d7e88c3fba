"""An int8 export draws nearly what torch draws, or is not written at all."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from rebeca_ray import schemas
from rebeca_ray.config.decoder import DecoderSettings
from rebeca_ray.decoder.choices import choose
from rebeca_ray.decoder.files import identify_decoder
from rebeca_ray.decoder.interface import Rows
from rebeca_ray.decoder.local import LocalDecoder
from rebeca_ray.errors import InputError, QualityGateError
from rebeca_ray.evaluation import quantization
from rebeca_ray.evaluation.quantization import export_quantized
from tests.conftest import D
from tests.decoder.test_denoising import psnr


class MeanColours:
    """A stand-in for the CLIP: the means of an image's rows of pixels, cut to D values."""

    def __init__(self, clip: str, device: str, background: str) -> None:
        assert (clip, device) == ("tiny/clip", "cpu")

    def encode(self, images: Sequence[Image.Image]) -> np.ndarray:
        return np.stack([np.asarray(image, np.float32).mean((1, 2))[:D] + 1 for image in images])


@pytest.fixture
def items(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A folder of embedded items, with the name of a CLIP."""
    monkeypatch.setattr(quantization, "EmbedImages", MeanColours)
    folder = tmp_path / "items"
    folder.mkdir()
    embeds = np.random.default_rng(3).standard_normal((2 * quantization.NUM_ITEMS, D)).astype(np.float32)
    column = pa.FixedSizeListArray.from_arrays(pa.array(embeds.ravel()), type=schemas.image_embeds(D))
    table = pa.table({"item_id": [f"item-{row}" for row in range(len(embeds))], "image_embeds": column})
    pq.write_table(table, folder / "part.parquet")
    (folder / "embedding.json").write_text(
        json.dumps({"clip": "f", "clip_name": "tiny/clip", "rows": len(embeds)})
    )
    return str(folder)


def test_an_int8_unet_draws_nearly_what_torch_draws(
    tiny_decoder: DecoderSettings,
    exported: DecoderSettings,
    items: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def copy_export(settings: DecoderSettings, folder: Path) -> None:
        assert settings == tiny_decoder.model_copy(update={"dtype": "float32", "device": "cpu"})
        shutil.copytree(str(exported.engine_dir), folder)

    monkeypatch.setattr(quantization, "export_decoder", copy_export)
    out = tmp_path / "export"
    cosines = export_quantized(tiny_decoder, out, items)
    assert cosines.int8 == pytest.approx(cosines.float32, abs=0.004)
    assert cosines.int8 != cosines.float32

    graph = onnx.load(out / "unet.onnx").graph
    kinds = {node.op_type for node in graph.node}
    assert {"QuantizeLinear", "DequantizeLinear"} <= kinds
    assert sorted(path.name for path in tmp_path.iterdir()) == ["export", "items"]

    rows = Rows.of(tiny_decoder, np.ones((3, D), np.float32), range(3))
    exact = np.stack(LocalDecoder(tiny_decoder).draw(rows)) / 255.0
    for engine in ("onnx", "openvino"):
        values = {"engine": engine, "engine_dir": str(out), "dtype": "int8"}
        settings = tiny_decoder.model_copy(update=values)
        assert psnr(np.stack(LocalDecoder(settings).draw(rows)) / 255.0, exact) >= 25
        assert choose(settings.model_copy(update={"dtype": "auto"})) == settings
    identity = identify_decoder(settings)
    assert {"int8/unet.onnx", "int8/unet.onnx.data"} <= set(identity.weights)
    assert identity.fingerprint(settings) != identify_decoder(tiny_decoder).fingerprint(tiny_decoder)
    with pytest.raises(InputError, match="already exists; remove it"):
        export_quantized(tiny_decoder, out, items)


def test_a_graph_that_draws_worse_is_not_written(
    tiny_decoder: DecoderSettings, items: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_dtype = {"float32": 0.9, "int8": 0.8955}
    monkeypatch.setattr(quantization, "export_decoder", lambda _, folder: folder.mkdir())
    monkeypatch.setattr(quantization, "quantize", lambda *_: None)
    monkeypatch.setattr(quantization, "mean_cosine", lambda settings, *_: by_dtype[settings.dtype])
    message = r"falls from 0\.9000 to 0\.8955, at most 0\.004 is allowed; nothing is written; export without"
    with pytest.raises(QualityGateError, match=message):
        export_quantized(tiny_decoder, tmp_path / "export", items)
    assert [path.name for path in tmp_path.iterdir()] == ["items"]
    by_dtype["int8"] = 0.8965
    assert export_quantized(tiny_decoder, tmp_path / "export", items).int8 == 0.8965


def test_unusable_items_are_named(tiny_decoder: DecoderSettings, items: str, tmp_path: Path) -> None:
    marker = Path(items) / "embedding.json"
    values = json.loads(marker.read_text())
    del values["clip_name"]
    marker.write_text(json.dumps(values))
    with pytest.raises(InputError, match=r"names no CLIP in embedding.json; give a folder that"):
        export_quantized(tiny_decoder, tmp_path / "export", items)
    marker.write_text(json.dumps({**values, "clip_name": "tiny/clip"}))
    part = Path(items) / "part.parquet"
    pq.write_table(pq.read_table(part).slice(0, 63), part)
    marker.write_text(json.dumps({**values, "clip_name": "tiny/clip", "rows": 63}))
    with pytest.raises(InputError, match="63 items, expected at least 64; embed more"):
        export_quantized(tiny_decoder, tmp_path / "export", items)
