"""Exporting a decoder: each of its networks as an ONNX graph, with what else the denoising loop needs, in one directory.

    unet.onnx  vae_decoder.onnx  image_projection.onnx  text_encoder.onnx      any batch size
    tokenizer/  scheduler/                                                     as in the model's own directory
    decoder.json                                                               sizes, precision, versions, where it came from

The image tokens and the weight of the image are inputs of the UNet: one graph serves every weight.
"""

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import Dim

from rebeca_ray.config.decoder import DecoderSettings
from rebeca_ray.decoder.files import find_decoder, hash_weights
from rebeca_ray.decoder.networks import Networks, load_torch_networks
from rebeca_ray.errors import InputError

OPSET = 20
NAMES = {  # inputs and output of each network, in the order of `networks.py`
    "text_encoder": (("input_ids",), "text"),
    "image_projection": (("image_embeds",), "image"),
    "unet": (("latents", "timestep", "text", "image", "scale"), "predicted"),
    "vae_decoder": (("latents",), "pixels"),
}


def export_decoder(settings: DecoderSettings, out: Path) -> dict[str, Path]:
    """Write the ONNX graphs of a decoder, in the precision of `settings.dtype`; returns their paths by name.

    `out` appears when all of it is there. Raises UserError if it is there already, or ONNX cannot be had.
    """
    try:
        import onnx
    except ImportError:
        raise InputError(
            "export: the packages onnx and onnxscript are missing; run `pip install 'rebeca-ray[onnx]'`"
        ) from None
    if out.exists():
        raise InputError(f"--out {out}: is there already; remove it, or give another folder")
    if settings.engine != "torch" or settings.dtype == "bfloat16":
        raise InputError(
            f"export: engine {settings.engine}, dtype {settings.dtype}; exported are torch networks in "
            "float32 or float16; set decoder.engine=torch decoder.engine_dir=null decoder.dtype=float16"
        )
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise InputError(
            "export: decoder.device is cuda, torch sees no GPU here; set decoder.device=cpu: the graphs are the same"
        )
    networks = load_torch_networks(settings.model_copy(update={"compile": False}))
    unfinished = out.with_name(f".{out.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    for name, inputs in example_inputs(networks).items():
        path = unfinished / f"{name}.onnx"
        export_network(getattr(networks, name), inputs, name, path)
        onnx.checker.check_model(path, full_check=True)
    networks.tokenizer.save_pretrained(unfinished / "tokenizer")
    (unfinished / "scheduler").mkdir()
    (unfinished / "scheduler" / "scheduler_config.json").write_text(
        json.dumps(networks.scheduler_config, indent=2, default=str)
    )
    files = {
        str(path.relative_to(unfinished)): path.stat().st_size
        for path in sorted(unfinished.rglob("*"))
        if path.is_file()
    }
    (unfinished / "decoder.json").write_text(
        json.dumps({**description(settings, networks), "files": files}, indent=2)
    )
    unfinished.rename(out)
    return {name: out / f"{name}.onnx" for name in NAMES}


def example_inputs(networks: Networks) -> dict[str, tuple[torch.Tensor, ...]]:
    """Inputs of every network for a batch of two, by the networks themselves."""
    device, dtype = networks.device, networks.dtype
    input_ids = torch.zeros((2, networks.tokenizer.model_max_length), dtype=torch.int64, device=device)
    embeds = torch.zeros((2, networks.embed_dim), dtype=dtype, device=device)
    size = networks.image_size // networks.vae_scale_factor
    latents = torch.zeros((2, networks.latent_channels, size, size), dtype=dtype, device=device)
    timestep, scale = torch.tensor([1, 999], device=device), torch.ones(2, dtype=dtype, device=device)
    with torch.inference_mode():
        text, image = networks.text_encoder(input_ids), networks.image_projection(embeds)
    return {
        "text_encoder": (input_ids,),
        "image_projection": (embeds,),
        "unet": (latents, timestep, text.clone(), image.clone(), scale),
        "vae_decoder": (latents,),
    }


def export_network(network: nn.Module, inputs: tuple[torch.Tensor, ...], name: str, path: Path) -> None:
    """One ONNX file, weights beside it where they are large; the first axis of every input is the batch."""
    input_names, output_name = NAMES[name]
    batch = Dim("batch", min=1, max=1024)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            network,
            inputs,
            path,
            input_names=list(input_names),
            output_names=[output_name],
            dynamic_shapes=tuple({0: batch} for _ in inputs),
            opset_version=OPSET,
            dynamo=True,
            external_data=True,
            optimize=True,
            verbose=False,
        )


def description(settings: DecoderSettings, networks: Networks) -> dict[str, Any]:
    """What the graphs are of, for whoever loads them."""
    return {
        "model": settings.model,
        "ip_adapter": settings.ip_adapter,
        "vae": settings.vae,
        "lora": settings.lora,
        "weights": hash_weights(find_decoder(settings)),
        "dtype": settings.dtype,
        "embed_dim": networks.embed_dim,
        "latent_channels": networks.latent_channels,
        "image_size": networks.image_size,
        "vae_scale_factor": networks.vae_scale_factor,
        "torch": torch.__version__,
        "opset": OPSET,
    }
