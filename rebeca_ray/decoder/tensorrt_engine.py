"""The networks of an exported decoder as TensorRT engines, which are good for one GPU and one TensorRT alone.

`serving/build_engines.py` writes them, with `engines.json` beside them that says what they are for; it is compared with the machine
before anything is loaded.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from rebeca_ray.config.decoder import DecoderSettings
from rebeca_ray.decoder.exported import exported_networks
from rebeca_ray.decoder.networks import Networks
from rebeca_ray.errors import InputError


def this_machine() -> dict[str, str]:
    """What an engine depends on: the GPU, its compute capability, TensorRT's version. Raises UserError without a GPU or TensorRT."""
    if not torch.cuda.is_available():
        raise InputError(
            "decoder.engine tensorrt: torch sees no GPU here; set decoder.engine to torch or onnx, or go where there is one"
        )
    try:
        import tensorrt
    except ImportError:
        raise InputError(
            "decoder.engine tensorrt: the package tensorrt is missing; install NVIDIA's wheel of it beside torch"
        ) from None
    gpu = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "gpu": gpu.name,
        "compute_capability": f"{gpu.major}.{gpu.minor}",
        "tensorrt": tensorrt.__version__,
    }


def check_engines(folder: Path, machine: dict[str, str], batch_size: int) -> None:
    """Raise UserError, with the command that builds them anew, if the engines in `folder` are not for this machine."""
    rebuild = f"build them here: python serving/build_engines.py {folder} --batch-size {batch_size}"
    try:
        sidecar = json.loads((folder / "engines.json").read_text())
    except (OSError, ValueError):
        raise InputError(f"decoder.engine_dir {folder}: no engines.json there; {rebuild}") from None
    for name, found in machine.items():
        if sidecar["machine"].get(name) != found:
            raise InputError(
                f"engines in {folder}: built for {name} {sidecar['machine'].get(name)}, this machine has {found}; {rebuild}"
            )
    if sidecar["batch_size"] < batch_size:
        found = sidecar["batch_size"]
        raise InputError(
            f"engines in {folder}: built for at most {found} images, decoder.batch_size is {batch_size}; {rebuild}"
        )
    for name, sha256 in sidecar["onnx"].items():
        if not (folder / name).is_file() or hash_file(folder / name) != sha256:
            raise InputError(
                f"engines in {folder}: {name} has changed since they were built from it; {rebuild}"
            )
    for name, sha256 in sidecar["plans"].items():
        if not (folder / name).is_file() or hash_file(folder / name) != sha256:
            raise InputError(f"engines in {folder}: {name} is missing or damaged; {rebuild}")


def hash_file(path: Path) -> str:
    with path.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def load_tensorrt_networks(settings: DecoderSettings) -> Networks:
    """What `rebeca export` and `serving/build_engines.py` wrote to `settings.engine_dir`."""
    check_engines(Path(str(settings.engine_dir)), this_machine(), settings.batch_size)
    return exported_networks(settings, lambda folder, name: TensorRTNetwork(folder / f"{name}.plan"))


class TensorRTNetwork:
    """One engine: torch tensors on the GPU in, torch tensor on the GPU out, on torch's own stream."""

    def __init__(self, path: Path) -> None:
        import tensorrt as trt

        self.runtime = trt.Runtime(trt.Logger(trt.Logger.WARNING))
        self.engine: Any = self.runtime.deserialize_cuda_engine(path.read_bytes())
        if self.engine is None:
            raise InputError(f"engine {path}: TensorRT cannot load it; its own lines above say why")
        self.context = self.engine.create_execution_context()
        if self.context is None:
            raise InputError(
                f"engine {path}: not enough memory on the GPU to run it; build it for fewer images"
            )
        names = [self.engine.get_tensor_name(index) for index in range(self.engine.num_io_tensors)]
        self.input_names = [
            name for name in names if self.engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
        ]
        (self.output_name,) = set(names) - set(self.input_names)
        self.output_dtype = {trt.float32: torch.float32, trt.float16: torch.float16}[
            self.engine.get_tensor_dtype(self.output_name)
        ]

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        dense = [
            value.contiguous() for value in inputs
        ]  # torch's allocator gives their memory to later work of the same stream alone
        for name, value in zip(self.input_names, dense, strict=True):
            self.context.set_input_shape(name, tuple(value.shape))
            self.context.set_tensor_address(name, value.data_ptr())
        output = torch.empty(
            tuple(self.context.get_tensor_shape(self.output_name)), dtype=self.output_dtype, device="cuda"
        )
        self.context.set_tensor_address(self.output_name, output.data_ptr())
        if not self.context.execute_async_v3(torch.cuda.current_stream().cuda_stream):
            raise RuntimeError("TensorRT could not run an engine; its own lines above say why")
        return output
