"""A second family with more conditioning runs in the same loop, export and engine."""

import json
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
from rebeca_ray.decoder.export import example_inputs, export_decoder, export_network
from rebeca_ray.decoder.exported.onnx_engine import OnnxNetwork
from rebeca_ray.decoder.families import sd
from rebeca_ray.decoder.interface import Rows
from rebeca_ray.decoder.networks import Family, Networks, Signature, Tensors
from rebeca_ray.errors import InputError
from tests.decoder.test_denoising import loop_for, psnr, rows_for


class PooledEncoder(nn.Module):
    """A second text encoder with two outputs, as SDXL has: tokens and pooled text."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids_BL: torch.Tensor) -> Tensors:
        tokens_BLH = self.encoder(input_ids_BL)
        return tokens_BLH * 0.5, tokens_BLH.mean(dim=1)


class PooledUNet(nn.Module):
    """A UNet with pooled text and time ids as further inputs."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

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
        shift_B = pooled_BH.mean(dim=1) + time_ids_BT.mean(dim=1) / 100
        return (
            self.unet(latents_BCYX, timestep_B, text_BLH, image_BKH, scale_B) + shift_B[:, None, None, None]
        )


def load(settings: DecoderSettings) -> Networks:
    base = sd.load_networks(settings)
    second = PooledEncoder(base.encoders["text_encoder"]).eval()  # type: ignore[arg-type]
    return replace(
        base,
        family=POOLED,
        encoders={**base.encoders, "text_encoder_2": second},
        unet=PooledUNet(base.unet).eval(),  # type: ignore[arg-type]
    )


def condition(networks: Networks, rows: Rows, guided: bool) -> Conditioning:
    base = sd.condition(networks, rows, guided)
    prompts = [*rows.prompts, *rows.negative_prompts] if guided else list(rows.prompts)
    tokenizer = networks.tokenizers["tokenizer"]
    tokens = tokenizer(
        prompts,
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    )
    text_BLH, pooled_BH = networks.encoders["text_encoder_2"](tokens.input_ids)
    time_ids_BT = torch.tensor([[networks.image_size, 0.0]]).repeat(len(base), 1)
    return base.replace(text=base["text"] + text_BLH, pooled=pooled_BH, time_ids=time_ids_BT)


def example_encoder_inputs(networks: Networks) -> dict[str, Tensors]:
    base = sd.example_inputs(networks)
    return {**base, "text_encoder_2": base["text_encoder"]}


POOLED = Family(
    name="pooled",
    encoders={
        **sd.FAMILY.encoders,
        "text_encoder_2": Signature(inputs=("input_ids",), outputs=("tokens", "pooled")),
    },
    conditioning=("text", "pooled", "time_ids", "image", "scale"),
    load_networks=load,
    load_tokenizers=sd.load_tokenizers,
    condition=condition,
    example_inputs=example_encoder_inputs,
)


def test_rows_of_a_second_family_equal_the_same_item_alone(tiny_decoder: DecoderSettings) -> None:
    loop, rows = DenoisingLoop(load(tiny_decoder), tiny_decoder), rows_for(tiny_decoder)
    together, finite = loop.draw(rows)
    assert finite.all()
    for row in range(5):
        assert psnr(together[row] / 255.0, loop.draw(rows.take([row] * 5))[0][0] / 255.0) >= 60
    assert psnr(together / 255.0, loop_for(tiny_decoder).draw(rows)[0] / 255.0) < 40


def test_a_second_family_is_exported_and_run_by_its_declared_names(
    tiny_decoder: DecoderSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sd, "FAMILY", POOLED)
    paths = export_decoder(tiny_decoder, tmp_path / "export")
    assert json.loads((tmp_path / "export" / "decoder.json").read_text())["family"] == "pooled"
    graph = onnx.load(paths["unet"], load_external_data=False).graph
    names = ["latents", "timestep", "text", "pooled", "time_ids", "image", "scale"]
    assert [value.name for value in graph.input] == names
    exported = tiny_decoder.model_copy(update={"engine": "onnx", "engine_dir": str(tmp_path / "export")})
    rows = rows_for(tiny_decoder)
    expected, _ = DenoisingLoop(load(tiny_decoder), tiny_decoder).draw(rows)
    drawn, _ = DenoisingLoop(load_networks(exported), exported).draw(rows)
    assert psnr(drawn / 255.0, expected / 255.0) >= 40


def test_a_graph_with_other_names_is_refused(tiny_decoder: DecoderSettings, tmp_path: Path) -> None:
    networks, path = sd.load_networks(tiny_decoder), tmp_path / "image_projection.onnx"
    signature = Signature(inputs=("embeds",), outputs=("image",))
    export_network(
        networks.encoders["image_projection"], example_inputs(networks)["image_projection"], signature, path
    )
    with pytest.raises(InputError, match="onnx: inputs embeds; expected image_embeds; export it again"):
        OnnxNetwork(path, sd.FAMILY.encoders["image_projection"], "cpu")


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
