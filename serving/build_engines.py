#!/usr/bin/env python
"""Build TensorRT engines from an exported decoder, for the GPU of this machine.

    python serving/build_engines.py DIR --batch-size 16

The engines are strongly typed: they have the precision of the export (`decoder.dtype=float16`). A build takes
minutes; the timing cache in DIR makes the next build shorter. Run this on the machine and in the container of
the engines.
"""

import json
from pathlib import Path
from typing import Annotated

import typer

from rebeca_ray.cli.runner import plain_errors, run_script
from rebeca_ray.console import console
from rebeca_ray.decoder.engines import find_family
from rebeca_ray.decoder.exported.tensorrt_engine import this_machine
from rebeca_ray.decoder.files import hash_file, read_description
from rebeca_ray.errors import InputError


def build_engine(onnx: Path, max_batch: int, timing_cache: Path, workspace_gib: float) -> bytes:
    """Return a serialized engine for batches of 1 to `max_batch`, fastest at `max_batch`.

    Raises InputError with the parser's reasons.
    """
    import tensorrt as trt  # `this_machine` has checked that it is installed

    logger = trt.Logger(trt.Logger.WARNING)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(onnx)):
        reasons = "; ".join(str(parser.get_error(index)) for index in range(parser.num_errors))
        raise InputError(f"{onnx}: TensorRT cannot read it ({reasons[:500]})")
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, int(workspace_gib * 2**30))
    config.set_timing_cache(
        config.create_timing_cache(timing_cache.read_bytes() if timing_cache.exists() else b""),
        ignore_mismatch=False,
    )
    # Only the first axis of an input is free: it is the batch.
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        rest = tuple(tensor.shape)[1:]
        profile.set_shape(tensor.name, (1, *rest), (max_batch, *rest), (max_batch, *rest))
    config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise InputError(f"{onnx}: TensorRT could not build an engine; its log above gives the reason")
    timing_cache.write_bytes(bytes(config.get_timing_cache().serialize()))
    return bytes(engine)


def main(
    folder: Annotated[Path, typer.Argument(help="Folder that `rebeca export` wrote.")],
    batch_size: Annotated[int, typer.Option(min=1, help="Images per batch, as decoder.batch_size.")] = 16,
    workspace_gib: Annotated[
        float, typer.Option(min=0, help="GiB of memory for the work space of a layer.")
    ] = 8,
) -> None:
    with plain_errors():
        machine, plans = this_machine(), {}
        description = read_description(folder)
        family = find_family(description["family"])
        # A timing cache fits one kind of GPU and one version of TensorRT.
        cache = f"timing-{machine['compute_capability']}-{machine['tensorrt']}.cache"
        for name, signature in family.signatures(deep_cache=description["deep_cache"]).items():
            doubled = 2 if signature.doubled else 1
            engine = build_engine(
                folder / f"{name}.onnx", doubled * batch_size, folder / cache, workspace_gib
            )
            (folder / f"{name}.plan").write_bytes(engine)
            plans[f"{name}.plan"] = hash_file(folder / f"{name}.plan")
            console.print(f"{name}: {len(engine) / 2**20:,.0f} MiB")
        graphs = [file for file in folder.iterdir() if file.suffix in (".onnx", ".data")]
        sidecar = {
            "machine": machine,
            "batch_size": batch_size,
            "workspace_gib": workspace_gib,
            "onnx": {file.name: hash_file(file) for file in sorted(graphs)},
            "plans": plans,
        }
        (folder / "engines.json").write_text(json.dumps(sidecar, indent=2))
        console.print(f"engines for {machine['gpu']}, TensorRT {machine['tensorrt']} -> {folder}")


if __name__ == "__main__":
    run_script(main)
