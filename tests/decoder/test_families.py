"""A second family with more conditioning runs in the same loop, export and engine."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import torch
from torch import nn

from rebeca_ray.config.decoder import DecoderSettings
from rebeca_ray.decoder.conditioning import Conditioning
from rebeca_ray.decoder.denoising import DenoisingLoop
from rebeca_ray.decoder.engines import load_networks
from rebeca_ray.decoder.export import export_decoder
from rebeca_ray.decoder.exported.onnx_engine import OnnxNetwork
from rebeca_ray.decoder.families import sd
from rebeca_ray.decoder.interface import Rows
from rebeca_ray.decoder.networks import Family, Networks, Signature, Tensors
from rebeca_ray.errors import InputError
from tests.decoder.test_denoising import psnr, rows_for


class PooledEncoder(nn.Module):
    """A text encoder with two outputs, as SDXL has: tokens and pooled text."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, WIDTH)

    def forward(self, input_ids_BL: torch.Tensor) -> Tensors:
        tokens_BLH = self.embedding(input_ids_BL)
        return tokens_BLH, tokens_BLH.mean(dim=1)


class PooledUNet(nn.Module):
    """A denoiser with pooled text and time ids as further inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.shift = nn.Conv2d(4, 4, 3, padding=1), nn.Linear(WIDTH, 4)

    def forward(
        self,
        latents_BCYX: torch.Tensor,
        timestep_B: torch.Tensor,
        text_BLH: torch.Tensor,
        pooled_BH: torch.Tensor,
        time_ids_BT: torch.Tensor,
        image_BKH: torch.Tensor,
        scale_B: torch.Tensor,
    ) -> torch.Tensor:
        context_BH = text_BLH[:, 1] + pooled_BH + scale_B[:, None] * image_BKH.mean(dim=1)
        time_B = timestep_B / 1000 + time_ids_BT.mean(dim=1) / 100
        shift_BC = self.shift(context_BH) + time_B[:, None]
        return self.convolution(latents_BCYX) + shift_BC[:, :, None, None]


def load(settings: DecoderSettings) -> Networks:
    """Return small networks, with the sizes, the tokenizer and the image projection of a Stable Diffusion."""
    base = sd.load_networks(settings)
    torch.manual_seed(3)
    encoder = PooledEncoder(len(base.tokenizers["tokenizer"])).eval()
    return replace(
        base,
        family=POOLED,
        encoders={"text_encoder": encoder, "image_projection": base.encoders["image_projection"]},
        unet=PooledUNet().eval(),
        vae_decoder=nn.ConvTranspose2d(4, 3, 2, stride=2).eval(),
    )


def condition(networks: Networks, rows: Rows, guided: bool) -> Conditioning:
    def encode(prompts: Sequence[str]) -> Conditioning:
        text_BLH, pooled_BH = networks.encoders["text_encoder"](sd.tokenize(networks, "tokenizer", prompts))
        return Conditioning({"text": text_BLH, "pooled": pooled_BH})

    unconditional = encode(rows.negative_prompts) if guided else None
    conditioning = sd.with_images(networks, rows, encode(rows.prompts), unconditional)
    time_ids_BT = torch.tensor([[networks.image_size, 0.0]]).repeat(len(conditioning), 1)
    return conditioning.replace(time_ids=time_ids_BT)


WIDTH = 16  # of the tokens and of the pooled text
POOLED = Family(
    name="pooled",
    encoders={
        "text_encoder": Signature(inputs=("input_ids",), outputs=("tokens", "pooled")),
        "image_projection": sd.FAMILY.encoders["image_projection"],
    },
    conditioning=("text", "pooled", "time_ids", "image", "scale"),
    load_networks=load,
    load_tokenizers=sd.load_tokenizers,
    condition=condition,
    example_inputs=sd.example_inputs,
)


def test_rows_of_a_second_family_equal_the_same_item_alone(tiny_decoder: DecoderSettings) -> None:
    loop, rows = DenoisingLoop(load(tiny_decoder), tiny_decoder), rows_for(tiny_decoder)
    together, finite = loop.draw(rows)
    assert finite.all()
    for row in range(5):
        assert psnr(together[row] / 255.0, loop.draw(rows.take([row] * 5))[0][0] / 255.0) >= 60
        assert psnr(together[row] / 255.0, together[row - 1] / 255.0) < 30


def test_a_second_family_is_exported_and_run_by_its_declared_names(
    tiny_decoder: DecoderSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sd, "FAMILY", POOLED)
    paths = export_decoder(tiny_decoder, tmp_path / "export")
    assert list(paths) == ["text_encoder", "image_projection", "unet", "vae_decoder"]
    assert json.loads((tmp_path / "export" / "decoder.json").read_text())["family"] == "pooled"
    graph = onnx.load(paths["unet"], load_external_data=False).graph
    names = ["latents", "timestep", "text", "pooled", "time_ids", "image", "scale"]
    assert [value.name for value in graph.input] == names
    exported = tiny_decoder.model_copy(update={"engine": "onnx", "engine_dir": str(tmp_path / "export")})
    rows = rows_for(tiny_decoder)
    expected, _ = DenoisingLoop(load(tiny_decoder), tiny_decoder).draw(rows)
    drawn, _ = DenoisingLoop(load_networks(exported), exported).draw(rows)
    assert psnr(drawn / 255.0, expected / 255.0) >= 40


def test_a_graph_with_other_names_is_refused(exported: DecoderSettings) -> None:
    path = Path(str(exported.engine_dir)) / "image_projection.onnx"
    signature = Signature(inputs=("embeds",), outputs=("image",))
    with pytest.raises(InputError, match="onnx: inputs image_embeds; expected embeds; export it again"):
        OnnxNetwork(path, signature, "cpu")


def test_a_conditioning_is_joined_and_indexed_by_rows() -> None:
    one = Conditioning({"text": torch.tensor([[1.0], [2.0]]), "scale": torch.tensor([0.1, 0.2])})
    other = Conditioning({"scale": torch.tensor([0.3]), "text": torch.tensor([[3.0]])})
    both = one.concatenate(other)
    assert len(both) == 3
    assert both["text"].flatten().tolist() == [1, 2, 3]
    picked = both.take([2, 0, 2])
    assert torch.equal(picked["scale"], torch.tensor([0.3, 0.1, 0.3]))
    assert [tensor.ndim for tensor in picked.in_order(("scale", "text"))] == [1, 2]
    assert list(one.replace(pooled=torch.zeros(2)).tensors) == ["text", "scale", "pooled"]
    with pytest.raises(AssertionError):
        one.concatenate(other.replace(pooled=torch.zeros(1)))
    with pytest.raises(AssertionError):
        one.in_order(("text",))
