"""A decoder that cannot be run is refused by its headers; spellings that can be run draw the same images."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from rebeca_ray.config.decoder import DecoderSettings
from rebeca_ray.decoder import files as files_module
from tests.conftest import D
from tests.decoder.spoiled import (
    ADAPTER,
    TEXT,
    UNET,
    VAE,
    Spoil,
    check_refusal,
    copied,
    cut,
    in_json,
    in_weights,
    pointer,
    removed,
    renamed,
)


def wider(weights: dict[str, torch.Tensor], width: int) -> dict[str, torch.Tensor]:
    """An adapter whose tokens have another width."""
    return {
        name: torch.zeros(4 * width, D)
        if name == "image_proj.proj.weight"
        else torch.zeros(4 * width)
        if name == "image_proj.proj.bias"
        else torch.zeros(width)
        if "norm" in name
        else torch.zeros(len(value), width)
        for name, value in weights.items()
    }


def flattened(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.flatten() for name, value in weights.items()}


WRONG: list[tuple[str, Spoil, str]] = [
    (
        "half an SDXL",
        in_json(
            "model_index.json",
            _class_name="StableDiffusionXLPipeline",
            text_encoder_2=["transformers", "CLIPTextModelWithProjection"],
            tokenizer_2=["transformers", "CLIPTokenizer"],
        ),
        "is a StableDiffusionXLPipeline without text_encoder_2; expected .*; copy the whole model",
    ),
    (
        "SDXL unet",
        in_json("unet/config.json", addition_embed_type="text_time"),
        "unet has addition_embed_type text_time, as SDXL has; expected none",
    ),
    (
        "ControlNet",
        in_json(
            "model_index.json",
            _class_name="StableDiffusionControlNetPipeline",
            controlnet=["diffusers", "ControlNetModel"],
        ),
        "is a StableDiffusionControlNetPipeline with controlnet; expected a StableDiffusionPipeline",
    ),
    (
        "a transformer",
        in_json(
            "model_index.json",
            _class_name="PixArtAlphaPipeline",
            unet=[None, None],
            transformer=["diffusers", "PixArtTransformer2DModel"],
        ),
        "is a PixArtAlphaPipeline with transformer",
    ),
    (
        "inpainting",
        lambda model: (
            in_json("model_index.json", _class_name="StableDiffusionInpaintPipeline")(model),
            in_json("unet/config.json", in_channels=9)(model),
        ),
        "unet has in_channels 9 and out_channels 4, it is of a StableDiffusionInpaintPipeline; expected 4",
    ),
    (
        "unclip",
        in_json("unet/config.json", class_embed_type="projection"),
        "unet has class_embed_type projection",
    ),
    ("distilled", in_json("unet/config.json", time_cond_proj_dim=256), "unet has time_cond_proj_dim 256"),
    (
        "another unet",
        in_json("unet/config.json", _class_name="UNet3DConditionModel"),
        "unet is a UNet3DConditionModel; expected a UNet2DConditionModel",
    ),
    (
        "config of another unet",
        in_json("unet/config.json", cross_attention_dim=768),
        "to_k.weight of shape .*, its config.json says 768|text_encoder has the width 16",
    ),
    ("no width", in_json("unet/config.json", cross_attention_dim=None), "unet has cross_attention_dim None"),
    ("no widths", in_json("unet/config.json", cross_attention_dim=[]), r"unet has cross_attention_dim \[\]"),
    ("flat weights", in_weights(UNET, flattened), "conv_in.weight of shape"),
    ("flat words", in_weights(TEXT, flattened), "has the width unknown"),
    ("a flat adapter", in_weights(ADAPTER, flattened), "no image_proj.proj.weight to read"),
    (
        "EMA keys",
        in_weights(UNET, lambda w: {f"model_ema.{k.replace('.', '')}": v for k, v in w.items()}),
        "unet has no conv_in.weight, it has model_ema",
    ),
    (
        "EMA folder",
        renamed("unet", "unet_ema"),
        "without unet; expected unet, vae, text_encoder, tokenizer, scheduler; rename unet_ema",
    ),
    (
        "no unet",
        removed("unet"),
        "is a StableDiffusionPipeline without unet; expected .*; copy the whole model",
    ),
    ("no text encoder", removed("text_encoder"), "without text_encoder"),
    ("no tokenizer", removed("tokenizer"), "without tokenizer"),
    ("no scheduler", removed("scheduler"), "without scheduler"),
    ("no vae", removed("vae"), "without vae"),
    (
        "no words",
        lambda model: [
            path.unlink() for path in (model / "tokenizer").glob("*") if "config" not in path.name
        ],
        "tokenizer has .*; expected tokenizer.json, or vocab.json and merges.txt",
    ),
    ("no config", removed("unet/config.json"), "has no unet/config.json; expected a whole diffusers model"),
    (
        "broken config",
        lambda model: (model / "vae/config.json").write_text("{"),
        "vae/config.json is damaged",
    ),
    (
        "a list",
        lambda model: (model / "scheduler/scheduler_config.json").write_text("[]"),
        "scheduler/scheduler_config.json is damaged; expected a JSON object",
    ),
    (
        "broken index",
        lambda model: (model / "model_index.json").write_bytes(b"\xff\xfe"),
        "model_index.json is damaged",
    ),
    ("no weights", removed(UNET), "unet has no weights; expected a .safetensors file"),
    ("cut weights", cut(UNET), f"{UNET} is damaged or missing; expected a whole safetensors file"),
    ("cut text encoder", cut(TEXT), f"{TEXT} is damaged or missing"),
    ("cut vae", cut(VAE), f"{VAE} is damaged or missing"),
    ("Git LFS", pointer(UNET), f"{UNET} is damaged or missing"),
    (
        "pickles",
        renamed(UNET, "unet/diffusion_pytorch_model.bin"),
        r"unet has pickles alone .* rebeca convert .*\.bin .*/unet/diffusion_pytorch_model.safetensors",
    ),
    (
        "pickled text encoder",
        renamed(TEXT, "text_encoder/pytorch_model.bin"),
        r"text_encoder has pickles alone .* /?.*text_encoder/model.safetensors",
    ),
    (
        "two variants",
        lambda model: (
            [
                shutil.copy(model / UNET, model / f"unet/diffusion_pytorch_model.{name}.safetensors")
                for name in ("fp16", "non_ema")
            ]
            and (model / UNET).unlink()
        ),
        "unet has the variants fp16, non_ema; expected one, or plain weights",
    ),
    (
        "no shard",
        lambda model: (
            (model / UNET).unlink(),
            (model / f"{UNET}.index.json").write_text(
                json.dumps(
                    {"weight_map": {"conv_in.weight": "diffusion_pytorch_model-00001-of-00002.safetensors"}}
                )
            ),
        ),
        "unet/diffusion_pytorch_model-00001-of-00002.safetensors is damaged or missing",
    ),
    (
        "broken shards",
        lambda model: ((model / UNET).unlink(), (model / f"{UNET}.index.json").write_text("{}")),
        "diffusion_pytorch_model.safetensors.index.json is damaged; expected a weight_map",
    ),
    (
        "another text encoder",
        in_json("text_encoder/config.json", model_type="t5"),
        "text_encoder is a t5; expected a CLIP text model",
    ),
    (
        "a wide text encoder",
        in_weights(
            TEXT,
            lambda w: {k: torch.zeros(len(v), 1024) if "token_embedding" in k else v for k, v in w.items()},
        ),
        "text_encoder has the width 1024, the unet reads 16; expected the same",
    ),
    (
        "16 latents",
        in_json("vae/config.json", latent_channels=16),
        "the autoencoder has 16 latent channels; expected 4",
    ),
    ("a VQ model", in_json("vae/config.json", _class_name="VQModel"), "the autoencoder is a VQModel"),
    (
        "an encoder alone",
        in_weights(VAE, lambda w: {k: v for k, v in w.items() if not k.startswith("decoder.")}),
        "the autoencoder's weights have no decoder",
    ),
    (
        "an oblong model",
        in_json("unet/config.json", sample_size=[8, 16]),
        r"sample_size \[8, 16\]; expected one number",
    ),
    (
        "adapter of SDXL",
        in_weights(ADAPTER, lambda w: wider(w, 2048)),
        r"ip_adapter .*: makes image tokens of width 2048 \(SDXL\), the model reads 16; expected the same",
    ),
    ("adapter of 2.x", in_weights(ADAPTER, lambda w: wider(w, 1024)), r"width 1024 \(Stable Diffusion 2.x\)"),
    (
        "half an adapter",
        in_weights(ADAPTER, lambda w: {k: v for k, v in w.items() if ".1." not in k}),
        "ip_adapter.1.to_k_ip.weight is no tensor; expected 32 x 16, as the model's unet reads it",
    ),
    (
        "too much adapter",
        in_weights(ADAPTER, lambda w: {**w, "ip_adapter.99.to_k_ip.weight": torch.zeros(1, 1)}),
        "ip_adapter.99.to_k_ip.weight is 1 x 1; expected no tensor",
    ),
    (
        "Face ID",
        in_weights(ADAPTER, lambda w: {**w, "ip_adapter.0.to_q_lora.down.weight": torch.zeros(1, 1)}),
        "ip_adapter.0.to_q_lora.down.weight is 1 x 1",
    ),
    (
        "16 image tokens",
        in_weights(
            ADAPTER,
            lambda w: {
                **w,
                "image_proj.proj.weight": torch.zeros(16 * 16, D),
                "image_proj.proj.bias": torch.zeros(16 * 16),
            },
        ),
        "image_proj.proj.bias is 256; expected 64",
    ),
]


@pytest.mark.parametrize(("name", "spoil", "message"), WRONG, ids=[name for name, _, _ in WRONG])
def test_a_model_of_another_kind_is_refused_by_name(
    tiny_decoder: DecoderSettings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    spoil: Spoil,
    message: str,
) -> None:
    settings = copied(tiny_decoder, tmp_path)
    spoil(Path(settings.model))
    monkeypatch.setattr(files_module, "hash_weights", lambda files: pytest.fail(f"{name} was accepted"))
    assert "expected" in check_refusal(settings, message)
