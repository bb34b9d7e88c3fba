"""Stable Diffusion XL with a plain IP-Adapter: two text encoders, pooled text, and the image size as input.

    text_encoder      input_ids_BL                                           -> text_BLH
    text_encoder_2    input_ids_BL                                           -> text_BLH, pooled_BP
    image_projection  image_embeds_BD                                        -> image_BKH
    unet              latents_BCYX, timestep_B, text_BLH, pooled_BP, time_ids_BT, image_BKH, scale_B
                                                                             -> predicted_BCYX
    vae_decoder       latents_BCYX                                           -> pixels_BRYX in [-1, 1]

The UNet's text has the states of both encoders side by side (Podell et al. 2023, 2.1). Its time ids are the
original size, the cut and the target size (2.2).

Shapes: as in `sd.py`, P width of the pooled text, T time ids.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rebeca_ray.config.decoder import DecoderSettings
from rebeca_ray.decoder.conditioning import Conditioning
from rebeca_ray.decoder.families import sd
from rebeca_ray.decoder.files import DecoderFiles, find_decoder
from rebeca_ray.decoder.inspection import zeroes_negative
from rebeca_ray.decoder.interface import Rows
from rebeca_ray.decoder.networks import DTYPES, Family, Networks, Signature, Tensors


class TextEncoder(nn.Module):
    """CLIP's text model; returns the state of every token before the last layer."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids_BL: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids_BL, output_hidden_states=True).hidden_states[-2]


class PooledTextEncoder(nn.Module):
    """CLIP's text model with its projection; returns the state before the last layer, and the pooled text."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids_BL: torch.Tensor) -> Tensors:
        output = self.model(input_ids_BL, output_hidden_states=True)
        return output.hidden_states[-2], output.text_embeds


class ConditionedUNet(nn.Module):
    """The UNet with its conditioning as inputs: text, pooled text, time ids, image tokens and weight.

    A shallow UNet takes `deep_BCYX` as the last input (`deep_cache.py`).
    """

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.unet = unet

    def forward(
        self,
        latents_BCYX: torch.Tensor,
        timestep_B: torch.Tensor,
        text_BLH: torch.Tensor,
        pooled_BP: torch.Tensor,
        time_ids_BT: torch.Tensor,
        *image: torch.Tensor,
    ) -> torch.Tensor | Tensors:
        return self.unet(
            latents_BCYX,
            timestep_B,
            (text_BLH, *image),
            # The UNet joins the pooled text with float32, and ONNX joins tensors of one type alone.
            added_cond_kwargs={"text_embeds": pooled_BP.float(), "time_ids": time_ids_BT},
            return_dict=False,
        )[0]


def load_networks(settings: DecoderSettings) -> Networks:
    """Load a model and its IP-Adapter. Raises InputError if they do not load."""
    files = find_decoder(settings)
    networks = run_pipeline(settings, load_pipeline(settings, files, DTYPES[settings.dtype]))
    return replace(networks, zeroes_negative=zeroes_negative(files.model))


def run_pipeline(settings: DecoderSettings, pipeline: Any) -> Networks:
    """Return the networks of a pipeline of diffusers, once: the image projection is taken out of its UNet."""
    encoders = {
        "text_encoder": TextEncoder(pipeline.text_encoder),
        "text_encoder_2": PooledTextEncoder(pipeline.text_encoder_2),
        "image_projection": sd.take_projection(pipeline.unet),
    }
    networks = sd.networks_of(settings, FAMILY, pipeline, ConditionedUNet, encoders)
    # The original autoencoder overflows in float16. The pipeline of diffusers runs it in float32 too.
    if networks.dtype == torch.float16 and pipeline.vae.config.force_upcast:
        networks = replace(networks, vae_decoder=networks.vae_decoder.float())  # type: ignore[attr-defined]
    return networks


def load_pipeline(settings: DecoderSettings, files: DecoderFiles, dtype: torch.dtype) -> Any:
    """Return diffusers' pipeline with its LoRA merged and its IP-Adapter loaded.

    The files have passed `inspect_files`; InputError says what still does not load.
    """
    from diffusers import StableDiffusionXLPipeline

    sd.quiet_libraries()
    with sd.loading(f"decoder.model {settings.model}"):
        pipeline: Any = StableDiffusionXLPipeline(**load_parts(settings, files, dtype), add_watermarker=False)
    sd.load_additions(settings, files, pipeline)
    return pipeline


def load_parts(settings: DecoderSettings, files: DecoderFiles, dtype: torch.dtype) -> dict[str, Any]:
    """Return the parts of the pipeline, each by its own class."""
    from transformers import CLIPTextModelWithProjection, CLIPTokenizer

    second = files.model / "text_encoder_2"
    return {
        **sd.load_parts(settings, files, dtype),
        "text_encoder_2": sd.load_part(settings, files, CLIPTextModelWithProjection, second, dtype),
        "tokenizer_2": CLIPTokenizer.from_pretrained(files.model / "tokenizer_2"),
    }


def load_tokenizers(folder: Path) -> dict[str, Any]:
    """Return both tokenizers of an export."""
    from transformers import CLIPTokenizer

    return {name: CLIPTokenizer.from_pretrained(folder / name) for name in ("tokenizer", "tokenizer_2")}


def condition(networks: Networks, rows: Rows, guided: bool) -> Conditioning:
    """Return the conditioning of the rows; with `guided`, of their unconditional twins too."""
    unconditional = encode_negative_prompts(networks, rows.negative_prompts) if guided else None
    conditioning = sd.with_images(networks, rows, encode_prompts(networks, rows.prompts), unconditional)
    # The images are square and uncut, and have the size that is drawn.
    size = networks.image_size
    time_ids = torch.tensor([[size, size, 0, 0, size, size]], device=networks.device, dtype=networks.dtype)
    return conditioning.replace(time_ids=time_ids.repeat(len(conditioning), 1))


def encode_prompts(networks: Networks, prompts: Sequence[str]) -> Conditioning:
    """Return `text` and `pooled` of each prompt.

    Recurring prompts are encoded again: with another number of rows, the pooled text may round otherwise.
    """
    first_BLH = networks.encoders["text_encoder"](sd.tokenize(networks, "tokenizer", prompts))
    second_BLH, pooled_BP = networks.encoders["text_encoder_2"](sd.tokenize(networks, "tokenizer_2", prompts))
    return Conditioning({"text": torch.cat([first_BLH, second_BLH], dim=-1), "pooled": pooled_BP})


def encode_negative_prompts(networks: Networks, prompts: Sequence[str]) -> Conditioning:
    """Return `text` and `pooled` of each negative prompt; those of an empty one are zeros in most models."""
    encoded = encode_prompts(networks, prompts)
    if not networks.zeroes_negative:
        return encoded
    empty_B = torch.tensor([prompt == "" for prompt in prompts], device=networks.device)
    return encoded.replace(
        text=encoded["text"].masked_fill(empty_B[:, None, None], 0),
        pooled=encoded["pooled"].masked_fill(empty_B[:, None], 0),
    )


def example_inputs(networks: Networks) -> dict[str, Tensors]:
    """Return the inputs of the three encoders for a batch of two."""
    tokens = (2, networks.tokenizers["tokenizer_2"].model_max_length)
    return {
        **sd.example_inputs(networks),
        "text_encoder_2": (torch.zeros(tokens, dtype=torch.int64, device=networks.device),),
    }


FAMILY = Family(
    name="sdxl",
    encoders={
        "text_encoder": Signature(inputs=("input_ids",), outputs=("text",)),
        "text_encoder_2": Signature(inputs=("input_ids",), outputs=("text", "pooled")),
        "image_projection": Signature(inputs=("image_embeds",), outputs=("image",), doubled=True),
    },
    conditioning=("text", "pooled", "time_ids", "image", "scale"),
    load_networks=load_networks,
    load_tokenizers=load_tokenizers,
    condition=condition,
    example_inputs=example_inputs,
)
