"""Convert the MobileNetV2 of the npm package `nsfwjs` into `model.safetensors`, once.

    npm pack nsfwjs@4.3.0 && tar -xzf nsfwjs-4.3.0.tgz
    python -m rebeca_ray.decoder.safety_model.convert package

The package holds the quantised weights as base64 in a script, and their names, shapes and ranges in another.
Every byte of a weight is kept as it is: a tensor is uint8, under its name and in its layout of Keras. The
tensor `quantization` holds the scale and the minimum of each, in the order of their names.
"""

import argparse
import base64
import json
import re
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from rebeca_ray.decoder.safety_model import CONFIG, WEIGHTS
from rebeca_ray.errors import InputError

MODEL = "dist/models/mobilenet_v2"
SPEC = re.compile(
    r'\{name:"(?P<name>[^"]+)",shape:\[(?P<shape>[\d,]*)\],dtype:"float32",'
    r'quantization:\{min:(?P<min>[-.\de]+),scale:(?P<scale>[-.\de]+),dtype:"uint8"\}\}'
)


@dataclass(frozen=True)
class Spec:
    """One weight of the package: its name in Keras, its shape, and the two numbers of its quantisation."""

    name: str
    shape: tuple[int, ...]
    scale: float
    minimum: float


def convert(package: Path, weights: Path = WEIGHTS) -> None:
    """Write the weights of an unpacked package. Raises InputError for a package of another layout."""
    specs = read_specs((package / MODEL / "model.min.js").read_text())
    data = read_bytes((package / MODEL / "group1-shard1of1.min.js").read_text())
    expected = sum(prod(spec.shape) for spec in specs)
    if not specs or len(data) != expected:
        raise InputError(
            f"{package}: {len(specs)} weights of {expected} bytes are described, {len(data)} bytes are held; "
            "expected the same number; give the unpacked nsfwjs 4.3.0"
        )
    tensors, start = {}, 0
    for spec in specs:
        end = start + prod(spec.shape)
        tensors[spec.name] = np.frombuffer(data[start:end], np.uint8).reshape(spec.shape)
        start = end
    ranges = {spec.name: (spec.scale, spec.minimum) for spec in specs}
    tensors["quantization"] = np.array([ranges[name] for name in sorted(ranges)], np.float64)
    save_file(tensors, weights, metadata=json.loads(CONFIG.read_text())["source"])


def read_specs(script: str) -> list[Spec]:
    """Return the weights that a script describes, in the order of their bytes."""
    return [
        Spec(
            name=match["name"],
            shape=tuple(int(size) for size in match["shape"].split(",") if size),
            scale=float(match["scale"]),
            minimum=float(match["min"]),
        )
        for match in SPEC.finditer(script)
    ]


def read_bytes(script: str) -> bytes:
    """Return the bytes of the longest text in a script, which is base64."""
    return base64.b64decode(max(re.findall(r'"([A-Za-z0-9+/=]*)"', script), key=len))


def main() -> None:
    """Read the folder of the package from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("package", type=Path)
    convert(parser.parse_args().package)


if __name__ == "__main__":
    main()
