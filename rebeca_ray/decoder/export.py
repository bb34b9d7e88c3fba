"""Export a decoder to one folder: each network as an ONNX graph, and the other needs of the denoising loop.

    unet.onnx  vae_decoder.onnx  and one per encoder      any batch size; for Stable Diffusion
                                                          image_projection.onnx and text_encoder.onnx,
                                                          for its XL text_encoder_2.onnx too
    shallow_unet.onnx                                     only with `cache_interval` above 1; the UNet
                                                          has a second output for it
    tokenizer/  tokenizer_2/  scheduler/                  as in the model's folder
    decoder.json                                          family, sizes, precision, versions, origin

The conditioning, with the weight of the image, is an input of the UNet: one graph serves every weight.
"""

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.export import Dim, ShapesCollection

from rebeca_ray.config.decoder import DecoderSettings
from rebeca_ray.decoder.choices import choose
from rebeca_ray.decoder.engines import load_networks
from rebeca_ray.decoder.files import hash_file, read_weights
from rebeca_ray.decoder.interface import Rows
from rebeca_ray.decoder.networks import Networks, Signature, Tensors
from rebeca_ray.errors import InputError
from rebeca_ray.progress import counting
from rebeca_ray.storage.objects import JsonObject

OPSET = 20


def export_decoder(settings: DecoderSettings, out: Path) -> dict[str, Path]:
    """Write the ONNX graphs of a decoder, in the precision of `settings.dtype`; return their paths by name.

    `out` appears once it is complete. Raises InputError if `out` exists, or if a package for ONNX is missing.
    """
    try:
        import onnx
    except ImportError:
        raise InputError(
            "export: the packages onnx and onnxscript are missing; run `pip install 'rebeca-ray[onnx]'`"
        ) from None
    if out.exists():
        raise InputError(f"--out {out}: already exists; remove it, or give another folder")
    if settings.dtype == "auto":
        settings = settings.model_copy(update={"dtype": "float32"})
    settings = choose(settings)
    if settings.engine != "torch" or settings.dtype == "bfloat16":
        raise InputError(
            f"export: engine {settings.engine}, dtype {settings.dtype}; expected engine torch with "
            "float32 or float16; set decoder.engine=torch decoder.engine_dir=null decoder.dtype=float16"
        )
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise InputError(
            "export: decoder.device is cuda, torch sees no GPU here; set decoder.device=cpu: "
            "the graphs are the same"
        )
    _, weights = read_weights(settings)
    networks = load_networks(settings.model_copy(update={"compile": False}))
    unfinished = out.with_name(f".{out.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    # Write one checked graph per network.
    graphs, inputs = networks.by_name(), example_inputs(networks)
    signatures = networks.family.signatures(deep_cache=networks.shallow_unet is not None)
    with counting("export graphs", len(signatures)) as counted:
        for name, signature in signatures.items():
            path = unfinished / f"{name}.onnx"
            export_network(graphs[name], inputs[name], signature, path)
            onnx.checker.check_model(path, full_check=True)
            counted.add()
    for name, tokenizer in networks.tokenizers.items():
        tokenizer.save_pretrained(unfinished / name)
    (unfinished / "scheduler").mkdir()
    (unfinished / "scheduler" / "scheduler_config.json").write_text(
        json.dumps(networks.scheduler_config, indent=2, default=str)
    )
    # The description lists every file, so that a reader recognises a partial copy and a replaced graph.
    paths = {
        str(path.relative_to(unfinished)): path for path in sorted(unfinished.rglob("*")) if path.is_file()
    }
    listing = {
        "files": {name: path.stat().st_size for name, path in paths.items()},
        "sha256": {name: hash_file(path) for name, path in paths.items()},
    }
    (unfinished / "decoder.json").write_text(
        json.dumps({**describe_export(settings, networks, weights), **listing}, indent=2)
    )
    unfinished.rename(out)
    return {name: out / f"{name}.onnx" for name in graphs}


def example_inputs(networks: Networks) -> dict[str, Tensors]:
    """Return inputs of every network for a batch of two; the networks themselves make the conditioning."""
    device, dtype = networks.device, networks.dtype
    size = networks.image_size // networks.vae_scale_factor
    latents = torch.zeros((2, networks.latent_channels, size, size), dtype=dtype, device=device)
    rows = Rows(
        image_embeds_BD=np.zeros((2, networks.embed_dim), np.float32),
        seeds=[0, 1],
        prompts=["", ""],
        negative_prompts=["", ""],
        guidance_scale_B=np.ones(2, np.float32),
        ip_adapter_scale_B=np.ones(2, np.float32),
    )
    with torch.inference_mode():
        conditioning = networks.condition(rows).in_order(networks.family.conditioning)
    # Clones made outside inference mode are plain tensors, as torch.export requires.
    plain = (tensor.clone() for tensor in conditioning)
    inputs = {
        **networks.family.example_inputs(networks),
        "unet": (latents, torch.tensor([1, 999], device=device), *plain),
        "vae_decoder": (latents,),
    }
    if networks.shallow_unet:
        deep = latents.new_zeros((2, networks.deep_channels, size, size))
        inputs["shallow_unet"] = (*inputs["unet"], deep)
    return inputs


def export_network(network: Any, inputs: Tensors, signature: Signature, path: Path) -> None:
    """Write one ONNX file, with large weights beside it; the first axis of every input is the batch."""
    # From 64 rows on, diffusers copies them, which no graph shows. With a higher bound, torch traces twice.
    shapes, batch = ShapesCollection(), Dim("batch", min=1, max=63)
    for tensor in inputs:
        shapes[tensor] = {0: batch}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            network,
            inputs,
            input_names=list(signature.inputs),
            output_names=list(signature.outputs),
            dynamic_shapes=shapes.dynamic_shapes(network, inputs),
            opset_version=OPSET,
            dynamo=True,
            optimize=False,
            verbose=False,
        )
    assert program is not None
    simplify(program.model)
    program.save(path, external_data=True)


def simplify(model: Any) -> None:
    """Fold the constants of an ONNX graph and shorten its arithmetic of shapes, in place.

    The graph is that of torch's `optimize=True`, which also looks through all nodes for pairs of slices, once
    per node: minutes for Stable Diffusion XL.
    """
    from onnx_ir.passes import common as passes
    from onnxscript import optimizer, rewriter
    from onnxscript.rewriter.rules import common as rules

    for _ in range(2):  # shorter shapes leave more constants
        optimizer.fold_constants(model, onnx_shape_inference=True)
        rewriter.rewrite(
            model,
            [
                rules.mul_by_1_rule,
                rules.div_by_1_rule,
                rules.materialize_reshape_shape_rule,
                rules.cast_cast_rule,
                rules.no_op_cast_rule,
                rules.no_op_expand_rule,
                rules.reshape_reshape_rule,
                rules.no_op_transpose_rule,
                rules.transpose_transpose_rule,
                rules.unsqueeze_unsqueeze_rule,
                rules.squeeze_reshape_1d_rule,
            ],
        )
    passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    passes.DeduplicateInitializersPass()(model)
    passes.CommonSubexpressionEliminationPass()(model)


def describe_export(settings: DecoderSettings, networks: Networks, weights: dict[str, str]) -> JsonObject:
    """Return the origin, sizes and versions of the graphs, for the loader of the export."""
    return {
        "family": networks.family.name,
        "model": settings.model,
        "ip_adapter": settings.ip_adapter,
        "vae": settings.vae,
        "lora": settings.lora,
        "weights": weights,
        "dtype": settings.dtype,
        "embed_dim": networks.embed_dim,
        "latent_channels": networks.latent_channels,
        "image_size": networks.image_size,
        "vae_scale_factor": networks.vae_scale_factor,
        "zeroes_negative": networks.zeroes_negative,
        "deep_cache": networks.shallow_unet is not None,
        "torch": torch.__version__,
        "opset": OPSET,
    }
