"""Replace `auto` in the settings by the device and the number format that this machine is good at."""

import json
from pathlib import Path

from rebeca_ray.config.decoder import DecoderSettings

BFLOAT16 = ("avx512_bf16", "amx_bf16", "bf16")  # x86 processors have the first two, ARM the third


def computes_bfloat16() -> bool:
    """Return whether the processor computes bfloat16. Others emulate it, a hundred times slower."""
    import torch

    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name) for name in BFLOAT16)


def is_open(settings: DecoderSettings) -> bool:
    """Return whether `auto` is left in the settings."""
    return "auto" in (settings.device, settings.dtype)


def choose(settings: DecoderSettings) -> DecoderSettings:
    """Return the settings without `auto`, for this machine.

    An export for ONNX Runtime or TensorRT has one number format. PyTorch takes float16 on a GPU; on a
    processor, PyTorch and OpenVINO take bfloat16 where it is computed. A quantised export stays int8.
    """
    if not is_open(settings):
        return settings
    device: str = settings.device
    if device == "auto":
        import torch

        device = "cuda" if torch.cuda.is_available() and settings.engine != "openvino" else "cpu"
    dtype: str = settings.dtype
    if dtype == "auto":
        exported = exported_dtype(settings)
        if settings.engine in ("onnx", "tensorrt") or exported == "int8":
            dtype = exported
        elif device == "cuda":
            dtype = "float16"
        else:
            dtype = "bfloat16" if computes_bfloat16() else "float32"
    return settings.model_copy(update={"device": device, "dtype": dtype})


def exported_dtype(settings: DecoderSettings) -> str:
    """Return the number format of the export, `float32` without one. Its loader names a broken export."""
    try:
        return str(json.loads((Path(str(settings.engine_dir)) / "decoder.json").read_text())["dtype"])
    except (OSError, ValueError, KeyError, TypeError):
        return "float32"
