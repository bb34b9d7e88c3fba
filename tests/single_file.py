"""A model as a single file in its authors' layout, beside a folder of its configs."""

import re
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from rebeca_ray.config.decoder import DecoderSettings

Tensors = dict[str, torch.Tensor]
UNET = {
    "conv_in.": "input_blocks.0.0.",
    "time_embedding.linear_1.": "time_embed.0.",
    "time_embedding.linear_2.": "time_embed.2.",
    "add_embedding.linear_1.": "label_emb.0.0.",
    "add_embedding.linear_2.": "label_emb.0.2.",
    "conv_norm_out.": "out.0.",
    "conv_out.": "out.2.",
    "mid_block.resnets.0.": "middle_block.0.",
    "mid_block.attentions.0.": "middle_block.1.",
    "mid_block.resnets.1.": "middle_block.2.",
}
RESNET = {
    ".norm1.": ".in_layers.0.",
    ".conv1.": ".in_layers.2.",
    ".norm2.": ".out_layers.0.",
    ".conv2.": ".out_layers.3.",
    ".time_emb_proj.": ".emb_layers.1.",
    ".conv_shortcut.": ".skip_connection.",
}
VAE = {
    "conv_norm_out": "norm_out",
    "conv_shortcut": "nin_shortcut",
    "down_blocks": "down",
    "resnets": "block",
    "downsamplers.0": "downsample",
    "upsamplers.0": "upsample",
    "mid_block.block.0": "mid.block_1",
    "mid_block.block.1": "mid.block_2",
    "mid_block.attentions.0": "mid.attn_1",
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}
OPEN_CLIP = {
    "encoder.layers.": "transformer.resblocks.",
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "fc1": "c_fc",
    "fc2": "c_proj",
    "final_layer_norm": "ln_final",
    "embeddings.token_embedding": "token_embedding",
    "embeddings.position_embedding.weight": "positional_embedding",
}


def write_single_file(settings: DecoderSettings, folder: Path) -> DecoderSettings:
    """Write a model of diffusers' layout as `folder/tiny.safetensors`, beside its configs and its adapter."""
    weights = ("diffusion_pytorch_model.safetensors", "model.safetensors")
    shutil.copytree(settings.model, folder / "tiny", ignore=shutil.ignore_patterns(*weights))
    networks = {path.parent.name: load_file(path) for path in Path(settings.model).glob("*/*model.saf*")}
    tensors = authors_layout(networks)
    # Beside the networks, the published files have tensors that no network of diffusers reads.
    tensors |= {"alphas_cumprod": torch.ones(1000), "model_ema.decay": torch.ones(())}
    start = text_start(networks) + ".text_model.embeddings."
    tensors[f"{start}position_ids"] = torch.arange(24)[None]
    save_file(tensors, folder / "tiny.safetensors")
    return settings.model_copy(update={"model": str(folder / "tiny.safetensors")})


def text_start(networks: dict[str, Tensors]) -> str:
    """The start of the first text encoder's tensors."""
    xl = "text_encoder_2" in networks
    return "conditioner.embedders.0.transformer" if xl else "cond_stage_model.transformer"


def authors_layout(networks: dict[str, Tensors]) -> Tensors:
    """The tensors of the parts of a model, given in diffusers' names, in those of its authors."""
    tensors = {f"model.diffusion_model.{key}": value for key, value in unet(networks["unet"]).items()}
    tensors |= {f"first_stage_model.{key}": value for key, value in vae(networks["vae"]).items()}
    for key, value in networks["text_encoder"].items():
        tensors[f"{text_start(networks)}.text_model.{key.removeprefix('text_model.')}"] = value
    if "text_encoder_2" in networks:
        second = open_clip(networks["text_encoder_2"])
        tensors |= {f"conditioner.embedders.1.model.{key}": value for key, value in second.items()}
    return {name: value.contiguous() for name, value in tensors.items()}


def unet(tensors: Tensors) -> Tensors:
    """A UNet; its authors number the layers of all blocks in one row, with the changes of resolution."""
    depth = len([key for key in tensors if re.fullmatch(r"down_blocks\.0\.resnets\.\d+\.conv1\.weight", key)])

    def name(key: str) -> str:
        words = UNET if ".attentions." in key else UNET | RESNET
        if match := re.fullmatch(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.+)", key):
            way, block, kind, layer, rest = match.groups()
            inner = 1 if kind == "attentions" else 0
            if kind == "downsamplers":
                layer, rest = str(depth), rest.replace("conv", "op")
            if kind == "upsamplers":
                layer = str(depth)
                inner = 2 if any(key.startswith(f"up_blocks.{block}.attentions") for key in tensors) else 1
            index = int(block) * (depth + 1) + int(layer) + (way == "down")
            key = f"{'input' if way == 'down' else 'output'}_blocks.{index}.{inner}.{rest}"
        return replaced(key, words)

    return {name(key): value for key, value in tensors.items()}


def vae(tensors: Tensors) -> Tensors:
    """An autoencoder; its attention is of convolutions, and its up blocks are numbered backwards."""
    last = max(int(match[1]) for key in tensors if (match := re.search(r"up_blocks\.(\d+)", key)))
    named = {}
    for key, value in tensors.items():
        if re.search(r"to_\w+(\.0)?\.weight", key):
            value = value[:, :, None, None]
        key = re.sub(r"up_blocks\.(\d+)", lambda match: f"up.{last - int(match[1])}", key)
        named[replaced(key, VAE)] = value
    return named


def open_clip(tensors: Tensors) -> Tensors:
    """A text encoder of OpenCLIP: one matrix for query, key and value, and a transposed projection."""
    named = {}
    for key, value in tensors.items():
        key = key.removeprefix("text_model.")
        if key == "text_projection.weight":
            named["text_projection"] = value.T
        elif match := re.fullmatch(r"encoder\.layers\.(\d+)\.self_attn\.q_proj\.(weight|bias)", key):
            rows = [tensors[f"text_model.{key.replace('q_proj', f'{name}_proj')}"] for name in "qkv"]
            named[f"transformer.resblocks.{match[1]}.attn.in_proj_{match[2]}"] = torch.cat(rows)
        elif not re.search(r"self_attn\.[kv]_proj", key):
            named[replaced(key, OPEN_CLIP)] = value
    return {**named, "logit_scale": torch.ones(())}


def replaced(text: str, words: dict[str, str]) -> str:
    for old, new in words.items():
        text = text.replace(old, new)
    return text
