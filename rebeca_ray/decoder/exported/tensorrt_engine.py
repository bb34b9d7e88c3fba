"""The networks of an exported decoder as TensorRT engines. An engine fits one kind of GPU and one TensorRT.

`serving/build_engines.py` writes the engines, and `engines.json` beside them with the machine they were built
for. That machine is compared with this one before anything is loaded.
"""

import json
from pathlib import Path
from typing import Any

import torch

from rebeca_ray.config.decoder import DecoderSettings
from rebeca_ray.decoder.exported.loading import check_names, exported_networks
from rebeca_ray.decoder.files import hash_file
from rebeca_ray.decoder.networks import Family, Networks, Signature
from rebeca_ray.errors import InputError
from rebeca_ray.storage.objects import JsonObject


def this_machine() -> dict[str, str]:
    """Return the GPU, its compute capability and TensorRT's version. Raises InputError if one is missing."""
    if not torch.cuda.is_available():
        raise InputError(
            "decoder.engine tensorrt: torch sees no GPU here; set decoder.engine to torch or onnx, "
            "or run on a machine with a GPU"
        )
    try:
        import tensorrt
    except ImportError:
        raise InputError(
            "decoder.engine tensorrt: the package tensorrt is missing; "
            "install NVIDIA's wheel of it beside torch"
        ) from None
    gpu = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "gpu": gpu.name,
        "compute_capability": f"{gpu.major}.{gpu.minor}",
        "tensorrt": tensorrt.__version__,
    }


def check_engines(folder: Path, machine: dict[str, str], batch_size: int) -> None:
    """Raise InputError, with the command that rebuilds them, if the engines do not fit this machine."""
    rebuild = f"build them here: python serving/build_engines.py {folder} --batch-size {batch_size}"
    try:
        sidecar = json.loads((folder / "engines.json").read_text())
    except (OSError, ValueError):
        raise InputError(f"decoder.engine_dir {folder}: no engines.json there; {rebuild}") from None
    for name, value in machine.items():
        built_for = sidecar["machine"].get(name)
        if built_for != value:
            raise InputError(
                f"engines in {folder}: built for {name} {built_for}, this machine has {value}; {rebuild}"
            )
    if sidecar["batch_size"] < batch_size:
        raise InputError(
            f"engines in {folder}: built for at most {sidecar['batch_size']} images, "
            f"decoder.batch_size is {batch_size}; {rebuild}"
        )
    for name, sha256 in sidecar["onnx"].items():
        if not (folder / name).is_file() or hash_file(folder / name) != sha256:
            raise InputError(
                f"engines in {folder}: {name} has changed since they were built from it; {rebuild}"
            )
    for name, sha256 in sidecar["plans"].items():
        if not (folder / name).is_file() or hash_file(folder / name) != sha256:
            raise InputError(f"engines in {folder}: {name} is missing or damaged; {rebuild}")


def load_tensorrt_networks(settings: DecoderSettings, family: Family, description: JsonObject) -> Networks:
    """Load the engines in `settings.engine_dir`. Raises InputError if they do not fit this machine."""
    check_engines(Path(str(settings.engine_dir)), this_machine(), settings.batch_size)
    return exported_networks(
        settings,
        family,
        description,
        lambda folder, name, signature: TensorRTNetwork(folder / f"{name}.plan", signature),
    )


class TensorRTNetwork:
    """One engine. It reads and writes torch tensors on the GPU, on torch's stream."""

    def __init__(self, path: Path, signature: Signature) -> None:
        import tensorrt as trt

        self.signature = signature
        self.runtime = trt.Runtime(trt.Logger(trt.Logger.WARNING))
        self.engine: Any = self.runtime.deserialize_cuda_engine(path.read_bytes())
        if self.engine is None:
            raise InputError(f"engine {path}: TensorRT cannot load it; its log above gives the reason")
        self.context = self.engine.create_execution_context()
        if self.context is None:
            raise InputError(
                f"engine {path}: not enough memory on the GPU to run it; build it for fewer images"
            )
        names = [self.engine.get_tensor_name(index) for index in range(self.engine.num_io_tensors)]
        inputs = [name for name in names if self.engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        check_names(path, signature, inputs, set(names) - set(inputs))
        dtypes = {trt.float32: torch.float32, trt.float16: torch.float16}
        self.output_dtypes = {name: dtypes[self.engine.get_tensor_dtype(name)] for name in signature.outputs}

    def __call__(self, *inputs: torch.Tensor) -> Any:
        # Copies live until the launch. Later, torch gives their memory only to work of the same stream.
        dense = [value.contiguous() for value in inputs]
        for name, value in zip(self.signature.inputs, dense, strict=True):
            self.context.set_input_shape(name, tuple(value.shape))
            self.context.set_tensor_address(name, value.data_ptr())
        # Shapes of the outputs are known once every input has its shape.
        outputs = []
        for name, dtype in self.output_dtypes.items():
            output = torch.empty(tuple(self.context.get_tensor_shape(name)), dtype=dtype, device="cuda")
            self.context.set_tensor_address(name, output.data_ptr())
            outputs.append(output)
        if not self.context.execute_async_v3(torch.cuda.current_stream().cuda_stream):
            raise RuntimeError("TensorRT could not run an engine; its log above gives the reason")
        return outputs[0] if len(outputs) == 1 else tuple(outputs)
