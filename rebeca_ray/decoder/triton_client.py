"""The decoder behind Triton Inference Server: a client of the server on the actor's node.

Each request is one full batch of the server. `window` requests are in flight at a time, so that the next
batch waits while one is drawn. gRPC retries requests that never reached the server. The client waits for a
server that restarts.
"""

import json
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import tritonclient.grpc as grpcclient
from tritonclient.utils import InferenceServerException

from rebeca_ray.config.decoder import DecoderSettings
from rebeca_ray.config.fields import NOT_SERVED, fields_with
from rebeca_ray.decoder.files import NOT_IN_FINGERPRINT, identify_decoder
from rebeca_ray.decoder.interface import DecodedImage, Rows
from rebeca_ray.errors import InputError, ServerLostError

MODEL = "decoder"
BYTES = ("image", "thumbnail", "error")
RETRIES = {
    "methodConfig": [
        {
            "name": [{"service": "inference.GRPCInferenceService", "method": "ModelInfer"}],
            "retryPolicy": {
                "maxAttempts": 5,
                "initialBackoff": "0.2s",
                "maxBackoff": "5s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ]
}


class TritonDecoder:
    """A client of the server at `settings.triton.url`.

    Raises InputError if the server runs another decoder than the settings, ServerLostError without a server.
    """

    def __init__(self, settings: DecoderSettings) -> None:
        self.settings = settings
        options = [("grpc.service_config", json.dumps(RETRIES)), ("grpc.max_receive_message_length", -1)]
        options.append(("grpc.max_reconnect_backoff_ms", 2000))  # the default grows to two minutes
        self.client = grpcclient.InferenceServerClient(settings.triton.url, channel_args=options)
        self.fingerprint = identify_decoder(settings).fingerprint(settings)
        self.wait_until_ready()
        self.request_rows = int(self.client.get_model_config(MODEL, as_json=True)["config"]["max_batch_size"])
        self.requests = ThreadPoolExecutor(settings.triton.window)

    def decode(self, rows: Rows) -> list[DecodedImage]:
        """Send requests of one server batch each; return their answers in order."""
        starts = range(0, len(rows), self.request_rows)
        parts = [rows.take(range(start, min(start + self.request_rows, len(rows)))) for start in starts]
        return [drawn for answer in self.requests.map(self.infer, parts) for drawn in answer]

    def infer(self, rows: Rows) -> list[DecodedImage]:
        """Send one request. Raises InputError if the server refuses it, ServerLostError without an answer."""
        until = time.monotonic() + self.settings.triton.ready_seconds + self.settings.triton.deadline_seconds
        # A silent server may be restarting: wait until it is ready and send the request again.
        while True:
            try:
                result = self.client.infer(
                    MODEL, request_inputs(rows), client_timeout=self.settings.triton.deadline_seconds
                )
            except InferenceServerException as error:
                if error.status() in ("StatusCode.INVALID_ARGUMENT", "StatusCode.NOT_FOUND"):
                    raise InputError(
                        f"decoder.triton {self.settings.triton.url}: "
                        f"{' '.join(str(error.message()).split())[:300]}"
                    ) from None
                if time.monotonic() > until:
                    raise ServerLostError(
                        f"decoder.triton {self.settings.triton.url}: {error.message()}"
                    ) from None
                time.sleep(0.5)
                self.wait_until_ready()
            else:
                return unpack(result)

    def wait_until_ready(self) -> None:
        """Wait for the server. Raises ServerLostError when time is up, InputError for another decoder."""
        until = time.monotonic() + self.settings.triton.ready_seconds
        reason = "it answers, but its model is not ready"
        while time.monotonic() < until:
            try:
                if self.client.is_model_ready(MODEL, client_timeout=5):
                    return self.check_served()
            except InferenceServerException as error:
                reason = str(error.message())
            time.sleep(0.5)
        raise ServerLostError(
            f"decoder.triton {self.settings.triton.url}: no server ready within "
            f"{self.settings.triton.ready_seconds:g} s ({reason}); start one on every node that renders "
            "(rebeca serve --config …), and give its gRPC address as host:port"
        )

    def check_served(self) -> None:
        """Raise InputError if the server runs another decoder. It may be another server than before."""
        config = self.client.get_model_config(MODEL, as_json=True, client_timeout=5)["config"]
        served = {name: value["string_value"] for name, value in config.get("parameters", {}).items()}
        if served.pop("fingerprint", None) != self.fingerprint:
            expected = parameters(self.settings)
            names = {*served, *expected} - NOT_IN_FINGERPRINT.keys()
            differ = sorted(name for name in names if served.get(name) != expected.get(name))
            raise InputError(
                f"decoder.triton {self.settings.triton.url}: serves another decoder than this config says "
                f"(they differ in {', '.join(differ) or 'the weights'}); start the server with the same "
                "`decoder:` section: rebeca serve --config …"
            )
        mark, expected_mark = (
            json.loads(values.get("provenance", '"xmp"')) for values in (served, parameters(self.settings))
        )
        if mark != expected_mark:
            raise InputError(
                f"decoder.triton {self.settings.triton.url}: serves images with the provenance {mark}, this "
                f"config needs {expected_mark}; start the server with the same `decoder:` section"
            )


def parameters(settings: DecoderSettings) -> dict[str, str]:
    """Return the settings that a server gets, each as JSON; a setting that is absent has its default.

    A server never signs: with the provenance `c2pa` it writes the XMP packet, and its client signs.
    """
    if settings.provenance == "c2pa":
        settings = settings.model_copy(update={"provenance": "xmp"})
    values = settings.model_dump(
        mode="json", exclude=fields_with(DecoderSettings, NOT_SERVED), exclude_defaults=True
    )
    return {key: json.dumps(value) for key, value in values.items()}


def request_inputs(rows: Rows) -> list[Any]:
    """Return the rows as Triton's inputs; the first axis is the batch."""
    columns: dict[str, tuple[np.ndarray, str]] = {
        "image_embeds": (rows.image_embeds_BD.astype(np.float32), "FP32"),
        "seed": (np.array(rows.seeds, np.int64)[:, None], "INT64"),
        "guidance_scale": (rows.guidance_scale_B.astype(np.float32)[:, None], "FP32"),
        "ip_adapter_scale": (rows.ip_adapter_scale_B.astype(np.float32)[:, None], "FP32"),
        "prompt": (pad([text.encode() for text in rows.prompts]), "UINT8"),
        "negative_prompt": (pad([text.encode() for text in rows.negative_prompts]), "UINT8"),
    }
    inputs = []
    for name, (values, kind) in columns.items():
        tensor = grpcclient.InferInput(name, list(values.shape), kind)
        tensor.set_data_from_numpy(values)
        inputs.append(tensor)
    return inputs


def pad(values: Sequence[bytes]) -> np.ndarray:
    """Return bytes as rows of one uint8 array, padded with zeros."""
    longest = max(1, *(len(value) for value in values))
    return (
        np.frombuffer(b"".join(value.ljust(longest, b"\0") for value in values), np.uint8)
        .reshape(len(values), longest)
        .copy()
    )


def pack(images: Sequence[DecodedImage]) -> dict[str, np.ndarray]:
    """Return outcomes as the server's output tensors: bytes padded to the longest, and their sizes."""
    tensors: dict[str, np.ndarray] = {}
    for name in BYTES:
        values = [getattr(image, name) or b"" for image in images]
        encoded = [value.encode() if isinstance(value, str) else value for value in values]
        tensors[name] = pad(encoded)
        tensors[f"{name}_size"] = np.array([[len(value)] for value in encoded], np.int32)
    tensors["width"] = np.array([[image.width or 0] for image in images], np.int32)
    tensors["height"] = np.array([[image.height or 0] for image in images], np.int32)
    checked = [np.nan if image.safety_probability is None else image.safety_probability for image in images]
    tensors["safety_probability"] = np.array(checked, np.float32)[:, None]
    tensors["drawn_seed"] = np.array([[image.seed] for image in images], np.int64)
    return tensors


def unpack(result: grpcclient.InferResult) -> list[DecodedImage]:
    """Return the outcomes in an answer; the inverse of `pack`."""
    sizes = {name: result.as_numpy(f"{name}_size")[:, 0] for name in BYTES}
    texts = {name: result.as_numpy(name) for name in BYTES}
    width, height, probability, seed = (
        result.as_numpy(name)[:, 0] for name in ("width", "height", "safety_probability", "drawn_seed")
    )
    images = []
    for row in range(len(seed)):
        image, thumbnail, error = (texts[name][row, : sizes[name][row]].tobytes() or None for name in BYTES)
        images.append(
            DecodedImage(
                seed=int(seed[row]),
                image=image,
                thumbnail=thumbnail,
                width=int(width[row]) or None,
                height=int(height[row]) or None,
                safety_probability=None if np.isnan(probability[row]) else float(probability[row]),
                error=error and error.decode(),
            )
        )
    return images
