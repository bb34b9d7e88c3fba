"""The networks of an exported decoder, run by ONNX Runtime."""

from pathlib import Path
from typing import Any

import torch

from rebeca_ray.config.decoder import DecoderSettings
from rebeca_ray.decoder.exported import exported_networks
from rebeca_ray.decoder.networks import Networks
from rebeca_ray.errors import InputError


class OnnxNetwork:
    """One graph: torch tensors in, torch tensor out, in the memory they are in."""

    def __init__(self, path: Path, device: str) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        provider = "CUDAExecutionProvider" if device == "cuda" else "CPUExecutionProvider"
        if provider not in onnxruntime.get_available_providers():
            raise InputError(
                f"decoder.engine onnx: ONNX Runtime has no {provider} here; install onnxruntime-gpu, or set decoder.device=cpu"
            )
        self.session: Any = onnxruntime.InferenceSession(path, options, providers=[provider])
        if self.session.get_providers()[0] != provider:  # it falls back to the CPU without a word
            raise InputError(
                f"decoder.engine onnx: {provider} does not start here; look at the GPU's driver, or set decoder.device=cpu"
            )
        self.input_names = [value.name for value in self.session.get_inputs()]
        self.output_name = self.session.get_outputs()[0].name

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        from onnxruntime import OrtValue

        binding = self.session.io_binding()
        for name, value in zip(self.input_names, inputs, strict=True):
            binding.bind_ortvalue_input(name, OrtValue.from_dlpack(value.contiguous()))
        binding.bind_output(self.output_name, inputs[0].device.type)
        if inputs[0].is_cuda:
            torch.cuda.current_stream().synchronize()  # ONNX Runtime has a stream of its own
        self.session.run_with_iobinding(binding)
        return torch.utils.dlpack.from_dlpack(binding.get_outputs()[0])


def load_onnx_networks(settings: DecoderSettings) -> Networks:
    """What `rebeca export` wrote to `settings.engine_dir`. Raises UserError if it is not that, or has another precision."""
    try:
        import onnxruntime  # noqa: F401
    except ImportError:
        raise InputError(
            "decoder.engine onnx: the package onnxruntime is missing; run `pip install 'rebeca-ray[onnx]'`"
        ) from None
    return exported_networks(
        settings, lambda folder, name: OnnxNetwork(folder / f"{name}.onnx", settings.device)
    )
