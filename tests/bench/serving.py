"""Images per second of Triton and of the decoder in this process: the same rows, in turn, with all threads.

python tests/bench/serving.py [--rounds 3] [--batch-sizes 16 40]
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from rebeca_ray.config.decoder import DecoderSettings, TritonSettings
from rebeca_ray.decoder.interface import Decoder, Rows
from rebeca_ray.decoder.local import LocalDecoder
from rebeca_ray.decoder.triton_client import TritonDecoder
from rebeca_ray.decoder.triton_server import triton_server
from rebeca_ray.stickers import DECODER

RESULTS = Path(__file__).parent / "results"
PORTS = {"http_port": 18000, "grpc_port": 18001, "metrics_port": 18002}
BATCHES = 4


def rate(decoder: Decoder, rows: Rows) -> float:
    started = time.perf_counter()
    images = decoder.decode(rows)
    seconds = time.perf_counter() - started
    assert all(image.image for image in images)
    return len(rows) / seconds


def measure(batch_size: int, rounds: int) -> dict[str, float]:
    """Return images per second of both, four batches at a time, and the server's mean batch."""
    settings = DecoderSettings(
        model=str(DECODER),
        num_inference_steps=9,
        decoder_guidance_scale=3.0,
        batch_size=batch_size,
        image_quality=100,
    )
    served = settings.model_copy(
        update={"backend": "triton", "triton": TritonSettings(url=f"127.0.0.1:{PORTS['grpc_port']}")}
    )
    embeds = np.random.default_rng(0).standard_normal((BATCHES * batch_size, 256)).astype(np.float32)
    rows = Rows.of(settings, embeds, range(len(embeds)))
    local = LocalDecoder(settings)
    with triton_server(settings, **PORTS, instances=1):
        remote = TritonDecoder(served)
        rates: dict[str, list[float]] = {"in process": [], "Triton": []}
        for _ in range(rounds):
            rates["in process"].append(rate(local, rows))
            rates["Triton"].append(rate(remote, rows))
        (model,) = remote.client.get_inference_statistics("decoder", as_json=True)["model_stats"]
    medians = {name: statistics.median(values) for name, values in rates.items()}
    return {
        **medians,
        "share": medians["Triton"] / medians["in process"],
        "mean_batch": int(model["inference_count"]) / int(model["execution_count"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[16, 40])
    arguments = parser.parse_args()
    threads = os.cpu_count() or 1
    torch.set_num_threads(threads)
    os.environ["OMP_NUM_THREADS"] = str(threads)  # of the server
    results = {str(size): measure(size, arguments.rounds) for size in arguments.batch_sizes}
    table = Table("batch", "in process, images/s", "Triton, images/s", "share", "mean batch of the server")
    for size, figures in results.items():
        table.add_row(
            size,
            f"{figures['in process']:.2f}",
            f"{figures['Triton']:.2f}",
            f"{figures['share']:.1%}",
            f"{figures['mean_batch']:.1f}",
        )
    Console().print(table)
    (RESULTS / "serving.json").write_text(json.dumps({"threads": threads, "batch": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
