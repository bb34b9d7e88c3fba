"""The networks of an exported decoder, run by ONNX Runtime."""

from pathlib import Path
from typing import Any

import torch

from rebeca_ray.config.decoder import DecoderSettings
from rebeca_ray.decoder.exported.loading import check_names, exported_networks
from rebeca_ray.decoder.networks import Family, Networks, Signature
from rebeca_ray.errors import InputError
from rebeca_ray.storage.objects import JsonObject


class OnnxNetwork:
    """One graph. Its torch tensors stay in the memory of their device."""

    def __init__(self, path: Path, signature: Signature, device: str) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        provider = "CUDAExecutionProvider" if device == "cuda" else "CPUExecutionProvider"
        if provider not in onnxruntime.get_available_providers():
            raise InputError(
                f"decoder.engine onnx: ONNX Runtime has no {provider} here; install onnxruntime-gpu, "
                "or set decoder.device=cpu"
            )
        self.session: Any = onnxruntime.InferenceSession(path, options, providers=[provider])
        # ONNX Runtime falls back to the CPU silently.
        if self.session.get_providers()[0] != provider:
            raise InputError(
                f"decoder.engine onnx: {provider} does not start here; check the GPU's driver, "
                "or set decoder.device=cpu"
            )
        self.signature = signature
        check_names(
            path,
            signature,
            [value.name for value in self.session.get_inputs()],
            [value.name for value in self.session.get_outputs()],
        )

    def __call__(self, *inputs: torch.Tensor) -> Any:
        from onnxruntime import OrtValue

        binding = self.session.io_binding()
        for name, value in zip(self.signature.inputs, inputs, strict=True):
            binding.bind_ortvalue_input(name, OrtValue.from_dlpack(value.contiguous()))
        for name in self.signature.outputs:
            binding.bind_output(name, inputs[0].device.type)
        if inputs[0].is_cuda:
            torch.cuda.current_stream().synchronize()  # ONNX Runtime runs on another stream
        self.session.run_with_iobinding(binding)
        outputs = tuple(torch.utils.dlpack.from_dlpack(value) for value in binding.get_outputs())
        return outputs[0] if len(outputs) == 1 else outputs


def load_onnx_networks(settings: DecoderSettings, family: Family, description: JsonObject) -> Networks:
    """Load the graphs in `settings.engine_dir`. Raises InputError without ONNX Runtime."""
    try:
        import onnxruntime  # noqa: F401
    except ImportError:
        raise InputError(
            "decoder.engine onnx: the package onnxruntime is missing; run `pip install 'rebeca-ray[onnx]'`"
        ) from None
    return exported_networks(
        settings,
        family,
        description,
        lambda folder, name, signature: OnnxNetwork(folder / f"{name}.onnx", signature, settings.device),
    )
