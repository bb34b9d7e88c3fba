"""Triton's Python backend around `LocalDecoder`: join requests to one batch, draw it, answer each request."""

import json
import os
import sys
from dataclasses import replace

# Some stubs of the backend ignore PYTHONPATH.
sys.path[:0] = os.environ.get("PYTHONPATH", "").split(os.pathsep)

import numpy as np
import torch
import triton_python_backend_utils as pb_utils

from rebeca_ray.config.decoder import DecoderSettings
from rebeca_ray.config.load import apply_override, parse_config
from rebeca_ray.decoder.files import identify_decoder
from rebeca_ray.decoder.interface import Rows
from rebeca_ray.decoder.local import LocalDecoder
from rebeca_ray.decoder.triton_client import pack
from rebeca_ray.errors import InputError


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        if args["model_instance_kind"] == "GPU":
            torch.cuda.set_device(int(args["model_instance_device_id"]))
        values: dict = {}
        parameters = {
            key: value["string_value"]
            for key, value in json.loads(args["model_config"])["parameters"].items()
        }
        # Clients compare the fingerprint with that of their config.
        expected = parameters.pop("fingerprint", None)
        for key, value in parameters.items():
            apply_override(values, f"{key}={value}")
        self.settings = parse_config(DecoderSettings, values, where="config.pbtxt: parameters")
        fingerprint = identify_decoder(self.settings).fingerprint(self.settings)
        if expected not in (None, fingerprint):
            raise InputError(
                f"config.pbtxt: decoder {fingerprint}; expected {expected}: weights have changed; "
                "run `rebeca serve` again"
            )
        self.decoder = LocalDecoder(self.settings)

    def execute(self, requests: list) -> list:
        """Draw the rows of all requests together; a request that cannot be read fails alone."""
        readable, answers = [], [None] * len(requests)
        for index, request in enumerate(requests):
            try:
                readable.append((index, self.read(request)))
            except (ValueError, TypeError, UnicodeDecodeError) as error:
                refusal = pb_utils.TritonError(f"decoder: {error}", pb_utils.TritonError.INVALID_ARG)
                answers[index] = pb_utils.InferenceResponse(error=refusal)
        if readable:
            outcomes = self.decoder.decode(Rows.concatenate([rows for _, rows in readable]))
            # Outcomes have the order of the requests: each request takes its rows from the front.
            for index, rows in readable:
                answered, outcomes = outcomes[: len(rows)], outcomes[len(rows) :]
                tensors = [
                    pb_utils.Tensor.from_dlpack(name, torch.from_numpy(value))
                    for name, value in pack(answered).items()
                ]
                answers[index] = pb_utils.InferenceResponse(output_tensors=tensors)
        return answers

    def read(self, request) -> Rows:
        """Return the rows of a request. Raises ValueError for one that cannot be drawn."""

        def numbers(name: str) -> np.ndarray | None:
            tensor = pb_utils.get_input_tensor_by_name(request, name)
            return None if tensor is None else torch.from_dlpack(tensor.to_dlpack()).numpy().copy()

        def words(name: str) -> list[str] | None:
            texts = numbers(name)
            return None if texts is None else [text.tobytes().rstrip(b"\0").decode() for text in texts]

        embeds, seeds = numbers("image_embeds"), numbers("seed")
        if embeds is None or seeds is None:
            # Triton does not check required inputs of a model that has optional ones.
            raise ValueError("inputs image_embeds and seed are needed")
        if (seeds < 0).any():
            raise ValueError(f"seed {seeds.min()} is negative")
        rows = Rows.of(self.settings, embeds, seeds[:, 0].tolist(), words("prompt"), words("negative_prompt"))
        scales = {
            "guidance_scale_B": numbers("guidance_scale"),
            "ip_adapter_scale_B": numbers("ip_adapter_scale"),
        }
        return replace(rows, **{name: value[:, 0] for name, value in scales.items() if value is not None})
