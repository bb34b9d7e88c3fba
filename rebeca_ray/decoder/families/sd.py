"""Stable Diffusion 1.x and 2.x with a plain IP-Adapter: one text encoder, one image embedding per item.

    text_encoder      input_ids_BL                                           -> text_BLH
    image_projection  image_embeds_BD                                        -> image_BKH
    unet              latents_BCYX, timestep_B, text_BLH, image_BKH, scale_B -> predicted_BCYX
    vae_decoder       latents_BCYX                                           -> pixels_BRYX in [-1, 1]

With `cache_interval`, `unet` returns deep_BCYX too, and `shallow_unet` takes it after the same inputs.
`sdxl.py` takes all of this over but the text encoders and the inputs of the UNet.

Shapes: B batch, D embed dim, L text tokens, K image tokens, T tokens of any kind, H context width,
C latent channels, R red green blue, Y X pixels or latents.
"""

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from rebeca_ray.config.decoder import DecoderSettings
from rebeca_ray.decoder.conditioning import Conditioning
from rebeca_ray.decoder.families.deep_cache import split_unet
from rebeca_ray.decoder.files import DecoderFiles, find_decoder
from rebeca_ray.decoder.headers import find_weights
from rebeca_ray.decoder.interface import Rows
from rebeca_ray.decoder.lora import LORA_PARTS, merge_lora
from rebeca_ray.decoder.networks import DTYPES, Family, Networks, Signature, Tensors
from rebeca_ray.decoder.single_file.networks import load_network
from rebeca_ray.errors import InputError, describe

log = logging.getLogger(__name__)


class TextEncoder(nn.Module):
    """CLIP's text model; returns the last hidden state of every token."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids_BL: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids_BL, return_dict=False)[0]


class ImageAttention(nn.Module):
    """Decoupled cross-attention (IP-Adapter, Ye et al. 2023, eq. 5): text and image have a softmax each.

    It differs from diffusers' processor in the weight of the image: a tensor with one row per image. Rows may
    therefore differ, and an exported graph has the weight as an input.
    """

    def __init__(self, to_k_ip: nn.Linear, to_v_ip: nn.Linear) -> None:
        super().__init__()
        self.to_k_ip, self.to_v_ip = to_k_ip, to_v_ip

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: Tensors,
        attention_mask: None = None,
    ) -> torch.Tensor:
        text_BLH, image_BKH, scale_B, *_ = encoder_hidden_states

        def heads(x_BTH: torch.Tensor) -> torch.Tensor:
            return x_BTH.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        query = heads(attn.to_q(hidden_states))
        text = F.scaled_dot_product_attention(query, heads(attn.to_k(text_BLH)), heads(attn.to_v(text_BLH)))
        image = F.scaled_dot_product_attention(
            query, heads(self.to_k_ip(image_BKH)), heads(self.to_v_ip(image_BKH))
        )
        mixed = text + scale_B[:, None, None, None] * image
        return attn.to_out[0](mixed.transpose(1, 2).flatten(-2))


class ConditionedUNet(nn.Module):
    """The UNet with its conditioning as inputs: text tokens, image tokens and the weight of the image.

    A shallow UNet takes `deep_BCYX` as the last input (`deep_cache.py`).
    """

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.unet = unet

    def forward(
        self, latents_BCYX: torch.Tensor, timestep_B: torch.Tensor, *conditioning: torch.Tensor
    ) -> torch.Tensor | Tensors:
        return self.unet(latents_BCYX, timestep_B, conditioning, return_dict=False)[0]


class VaeDecoder(nn.Module):
    """The decoder of the autoencoder; it takes latents in the UNet's scale."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latents_BCYX: torch.Tensor) -> torch.Tensor:
        latents_BCYX = latents_BCYX.to(self.vae.dtype)
        return self.vae.decode(latents_BCYX / self.vae.config.scaling_factor, return_dict=False)[0]


def load_networks(settings: DecoderSettings) -> Networks:
    """Load a model and its IP-Adapter. Raises InputError if they do not load."""
    return run_pipeline(settings, load_pipeline(settings, find_decoder(settings), DTYPES[settings.dtype]))


def run_pipeline(settings: DecoderSettings, pipeline: Any) -> Networks:
    """Return the networks of a pipeline of diffusers, once: the image projection is taken out of its UNet."""
    encoders = {
        "text_encoder": TextEncoder(pipeline.text_encoder),
        "image_projection": take_projection(pipeline.unet),
    }
    return networks_of(settings, FAMILY, pipeline, ConditionedUNet, encoders)


def take_projection(unet: Any) -> nn.Module:
    """Take the image projection out of a UNet, and give its cross-attentions `ImageAttention`.

    The projection is a separate network, because its output is the same at every step.
    """
    processors = dict(unet.attn_processors)
    for name, processor in processors.items():
        if hasattr(processor, "to_k_ip"):
            processors[name] = ImageAttention(processor.to_k_ip[0], processor.to_v_ip[0])
    unet.set_attn_processor(processors)
    (projection,) = unet.encoder_hid_proj.image_projection_layers
    unet.encoder_hid_proj = None
    return projection


def networks_of(
    settings: DecoderSettings,
    family: Family,
    pipeline: Any,
    conditioned: Callable[[Any], nn.Module],
    encoders: Mapping[str, nn.Module],
) -> Networks:
    """Return the networks on their device and in their precision, ready to draw.

    `conditioned` gives a UNet of diffusers the inputs of the family.
    """
    dtype = DTYPES[settings.dtype]

    def ready(module: nn.Module) -> Any:
        module = module.to(settings.device, dtype).eval().requires_grad_(False)
        return module.to(memory_format=torch.channels_last) if settings.device == "cuda" else module

    whole, shallow = pipeline.unet, None
    if settings.cache_interval > 1:
        whole, shallow = split_unet(pipeline.unet, settings.model)
    unet, projection = ready(conditioned(whole)), encoders["image_projection"]
    return Networks(
        family=family,
        encoders={name: ready(encoder) for name, encoder in encoders.items()},
        unet=torch.compile(unet, mode="reduce-overhead") if settings.compile else unet,
        shallow_unet=shallow and ready(conditioned(shallow)),
        vae_decoder=ready(VaeDecoder(pipeline.vae)),
        tokenizers={
            name: tokenizer
            for name, tokenizer in pipeline.components.items()
            if name in ("tokenizer", "tokenizer_2")
        },
        scheduler_config=dict(pipeline.scheduler.config),
        embed_dim=projection.image_embeds.in_features,  # type: ignore[union-attr, arg-type]
        latent_channels=pipeline.unet.config.in_channels,
        deep_channels=pipeline.unet.config.block_out_channels[1] if shallow else 0,
        image_size=settings.image_size or pipeline.unet.config.sample_size * pipeline.vae_scale_factor,
        vae_scale_factor=pipeline.vae_scale_factor,
        device=settings.device,
        dtype=dtype,
    )


def load_pipeline(settings: DecoderSettings, files: DecoderFiles, dtype: torch.dtype) -> Any:
    """Return diffusers' pipeline with its LoRA merged and its IP-Adapter loaded.

    The files have passed `inspect_files`; InputError says what still does not load.
    """
    from diffusers import StableDiffusionPipeline

    quiet_libraries()
    with loading(f"decoder.model {settings.model}"):
        parts = load_parts(settings, files, dtype)
        pipeline: Any = StableDiffusionPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    load_additions(settings, files, pipeline)
    return pipeline


def quiet_libraries() -> None:
    """Silence diffusers and transformers: they warn about a missing checker, and show bars in every actor."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def load_additions(settings: DecoderSettings, files: DecoderFiles, pipeline: Any) -> None:
    """Merge the LoRA into a pipeline, and load its IP-Adapter. Raises InputError if they do not load."""
    # The LoRA is merged before the adapter replaces the attention processors.
    if files.lora:
        changed = [part for part in LORA_PARTS if part in pipeline.components]
        merge_lora(
            f"decoder.lora {settings.lora}", files.lora, {part: getattr(pipeline, part) for part in changed}
        )
    adapter = files.ip_adapter
    with loading(f"decoder.ip_adapter {settings.ip_adapter}"):
        pipeline.load_ip_adapter(
            str(adapter.parent), subfolder="", weight_name=adapter.name, image_encoder_folder=None
        )


def load_parts(settings: DecoderSettings, files: DecoderFiles, dtype: torch.dtype) -> dict[str, Any]:
    """Return the parts of the pipeline, each by its own class: old models name classes that are gone."""
    import diffusers
    from transformers import CLIPTextModel, CLIPTokenizer

    def load(kind: Any, folder: Path) -> Any:
        return load_part(settings, files, kind, folder, dtype)

    config = json.loads((files.model / "scheduler" / "scheduler_config.json").read_text())
    # The class fills in the settings that its config leaves out.
    scheduler = getattr(diffusers, str(config.get("_class_name")), diffusers.DPMSolverMultistepScheduler)
    return {
        "unet": load(diffusers.UNet2DConditionModel, files.model / "unet"),
        "vae": load(diffusers.AutoModel, files.vae or files.model / "vae"),
        "text_encoder": load(CLIPTextModel, files.model / "text_encoder"),
        "tokenizer": CLIPTokenizer.from_pretrained(files.model / "tokenizer"),
        "scheduler": scheduler.from_config(config),
    }


def load_part(
    settings: DecoderSettings, files: DecoderFiles, kind: Any, folder: Path, dtype: torch.dtype
) -> Any:
    """Return one network of a model, an instance of the class `kind`."""
    if files.checkpoint and folder != files.vae:
        return load_network(files.checkpoint, folder, dtype)
    _, variant = find_weights(f"decoder.model {settings.model}", folder)
    return kind.from_pretrained(str(folder), variant=variant, dtype=dtype, use_safetensors=True)


@contextmanager
def loading(what: str) -> Iterator[None]:
    """Raise what diffusers or transformers raise as an InputError of one line; the log has their text."""
    try:
        yield
    except (InputError, torch.OutOfMemoryError, torch.AcceleratorError, MemoryError):
        raise
    except Exception as error:  # they raise errors of any type
        log.debug("%s: %s", what, describe(error))
        raise InputError(
            f"{what}: cannot be loaded ({type(error).__name__}); expected files that diffusers saved; "
            "save or copy them again (the log at level debug has the reason)"
        ) from None


def load_tokenizers(folder: Path) -> dict[str, Any]:
    """Return the tokenizer of an export."""
    from transformers import CLIPTokenizer

    return {"tokenizer": CLIPTokenizer.from_pretrained(folder / "tokenizer")}


def condition(networks: Networks, rows: Rows, guided: bool) -> Conditioning:
    """Return `text`, `image` and `scale` of the rows; with `guided`, of their unconditional twins too."""
    unconditional = encode_prompts(networks, rows.negative_prompts) if guided else None
    return with_images(networks, rows, encode_prompts(networks, rows.prompts), unconditional)


def with_images(
    networks: Networks, rows: Rows, conditional: Conditioning, unconditional: Conditioning | None
) -> Conditioning:
    """Return the texts of both halves, joined, with the `image` and `scale` of the rows."""
    device, dtype = networks.device, networks.dtype
    embeds_BD = torch.from_numpy(np.ascontiguousarray(rows.image_embeds_BD)).to(device, dtype)
    scale_B = torch.from_numpy(rows.ip_adapter_scale_B).to(device, dtype)
    conditioning = conditional.replace(image=embeds_BD, scale=scale_B)
    if unconditional is not None:
        # An unconditional row has a zero embedding, as published, and the negative prompt.
        conditioning = conditioning.concatenate(
            unconditional.replace(image=torch.zeros_like(embeds_BD), scale=scale_B)
        )
    # Both halves are projected together: with another batch size the projection may round otherwise.
    return conditioning.replace(image=networks.encoders["image_projection"](conditioning["image"]))


def encode_prompts(networks: Networks, prompts: Sequence[str]) -> Conditioning:
    """Return the `text` of each prompt; a prompt that recurs is encoded once."""
    distinct = sorted(set(prompts))
    text_BLH = networks.encoders["text_encoder"](tokenize(networks, "tokenizer", distinct))
    return Conditioning({"text": text_BLH}).take([distinct.index(prompt) for prompt in prompts])


def tokenize(networks: Networks, name: str, prompts: Sequence[str]) -> torch.Tensor:
    """Return the token ids [B, L] of prompts by the tokenizer `name`, padded and cut to its length."""
    tokenizer = networks.tokenizers[name]
    tokens = tokenizer(
        list(prompts),
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    )
    return tokens.input_ids.to(networks.device)


def example_inputs(networks: Networks) -> dict[str, Tensors]:
    """Return the inputs of both encoders for a batch of two."""
    tokens = (2, networks.tokenizers["tokenizer"].model_max_length)
    return {
        "text_encoder": (torch.zeros(tokens, dtype=torch.int64, device=networks.device),),
        "image_projection": (
            torch.zeros((2, networks.embed_dim), dtype=networks.dtype, device=networks.device),
        ),
    }


FAMILY = Family(
    name="sd",
    encoders={
        "text_encoder": Signature(inputs=("input_ids",), outputs=("text",)),
        "image_projection": Signature(inputs=("image_embeds",), outputs=("image",), doubled=True),
    },
    conditioning=("text", "image", "scale"),
    load_networks=load_networks,
    load_tokenizers=load_tokenizers,
    condition=condition,
    example_inputs=example_inputs,
)
