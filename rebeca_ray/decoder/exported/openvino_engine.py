"""The networks of an exported decoder, run by OpenVINO on a processor."""

from pathlib import Path
from typing import Any

import torch

from rebeca_ray.config.decoder import DecoderSettings
from rebeca_ray.decoder.exported.loading import check_names, exported_networks
from rebeca_ray.decoder.networks import Family, Networks, Signature
from rebeca_ray.errors import InputError
from rebeca_ray.storage.objects import JsonObject

# A quantised graph has float32 around its int8, so that its images do not depend on the processor.
PRECISIONS = {"float32": "f32", "bfloat16": "bf16", "int8": "f32"}


class OpenVinoNetwork:
    """One graph. It takes and returns float32, in whatever precision it computes.

    A graph of latents is compiled for each batch size that occurs, which are two: a fixed shape is a quarter
    faster. The encoders take any number of prompts, so theirs stays free.
    """

    def __init__(self, path: Path, signature: Signature, precision: str) -> None:
        import openvino

        self.openvino, self.core = openvino, openvino.Core()
        self.model: Any = self.core.read_model(path)
        self.signature = signature
        self.options = {
            "INFERENCE_PRECISION_HINT": precision,
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "NUM_STREAMS": 1,
            "ENABLE_CPU_PINNING": False,  # else all actors of a machine would share its first cores
        }
        check_names(
            path,
            signature,
            [value.get_any_name() for value in self.model.inputs],
            [value.get_any_name() for value in self.model.outputs],
        )
        self.requests: dict[int, Any] = {}  # by batch size; 0: any

    def __call__(self, *inputs: torch.Tensor) -> Any:
        named = dict(zip(self.signature.inputs, (value.contiguous() for value in inputs), strict=True))
        request = self.request_for(named)
        request.infer({name: value.numpy() for name, value in named.items()}, share_inputs=True)
        outputs = tuple(
            torch.from_numpy(request.get_tensor(name).data.copy()) for name in self.signature.outputs
        )
        return outputs[0] if len(outputs) == 1 else outputs

    def request_for(self, named: dict[str, torch.Tensor]) -> Any:
        """Return the compiled graph for these inputs; compile it at its first use."""
        fixed = "latents" in named
        batch = len(named["latents"]) if fixed else 0
        if batch not in self.requests:
            model = self.model.clone()
            if fixed:
                model.reshape({name: list(value.shape) for name, value in named.items()})
            self.requests[batch] = self.core.compile_model(model, "CPU", self.options).create_infer_request()
        return self.requests[batch]


def load_openvino_networks(settings: DecoderSettings, family: Family, description: JsonObject) -> Networks:
    """Load the graphs in `settings.engine_dir`. Raises InputError without OpenVINO."""
    try:
        import openvino  # noqa: F401
    except ImportError:
        raise InputError(
            "decoder.engine openvino: the package openvino is missing; "
            "run `pip install 'rebeca-ray[openvino]'`"
        ) from None
    return exported_networks(
        settings,
        family,
        description,
        lambda folder, name, signature: OpenVinoNetwork(
            folder / f"{name}.onnx", signature, PRECISIONS[settings.dtype]
        ),
    )
