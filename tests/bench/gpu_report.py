"""Keep the figures of one GPU in one JSON file, each beside its share of a roofline.

The roofline is the rate of a large matrix product in float16, measured on the same GPU. A tiny report is for
trying the scripts on a CPU.
"""

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

from rebeca_ray.errors import describe
from rebeca_ray.storage.objects import JsonObject

RESULTS = Path(__file__).parent / "results"
ROUNDS, MAX_SECONDS = 3, 5.0  # of a figure; a slow one has fewer rounds


class GpuReport:
    """The figures of this machine's GPU, or of its CPU if `tiny`, in a JSON file in `folder`.

    Each figure is written at once, so that it outlasts an error or a time limit later.
    """

    def __init__(self, folder: Path, *, tiny: bool) -> None:
        self.device = "cpu" if tiny else "cuda"
        self.name = "tiny on the CPU" if tiny else torch.cuda.get_device_name()
        self.path = folder / f"gpu-{self.name.lower().replace(' ', '-')}.json"

    def read(self) -> JsonObject:
        """Return the report so far; a new one has no figures."""
        if self.path.exists():
            return json.loads(self.path.read_text())
        versions = {"torch": torch.__version__, "cuda": torch.version.cuda}
        return {"device": self.name, **versions, "parts": {}, "figures": []}

    def write(self, values: JsonObject) -> None:
        """Replace the report as a whole: a time limit may stop this process at any line."""
        unfinished = self.path.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(values, indent=2) + "\n")
        unfinished.replace(self.path)

    def add_part(self, name: str, outcome: str, seconds: float) -> None:
        """Add the outcome of a part, and its duration."""
        values = self.read()
        values["parts"][name] = {"outcome": outcome, "seconds": round(seconds, 1)}
        self.write(values)

    def roofline(self) -> float:
        """Return the TFLOP/s of a large matrix product, measured once per report."""
        values = self.read()
        if "roofline_tflops" not in values:
            values["roofline_tflops"] = measure_roofline(self.device)
            self.write(values)
        return values["roofline_tflops"]

    def measure(
        self, labels: JsonObject, *, tflop: float, warm: Callable[[], object], rate: Callable[[], float]
    ) -> None:
        """Add a figure under `model`, `variant` and `batch`: the median rate of some rounds.

        `rate` returns items per second, and an item takes `tflop`. An error, such as too little memory for
        the batch, is written in place of the figure.
        """
        try:
            warm()
            per_second = median_rate(rate)
            figure: JsonObject = {
                "per_second": per_second,
                "tflop_per_item": tflop,
                "tflops": per_second * tflop,
                "roofline_share": per_second * tflop / self.roofline(),
            }
        except Exception as error:  # torch and CUDA raise errors of any type
            figure = {"error": describe(error)}
        Console().print(*labels.values(), *cells(figure))
        values = self.read()
        others = [other for other in values["figures"] if labels.items() - other.items()]
        self.write({**values, "figures": [*others, {**labels, **figure}]})

    def print(self) -> None:
        """Print a table of the figures, and the outcome of each part."""
        values, console = self.read(), Console()
        table = Table("", "variant", "batch", "per second", "TFLOP/s", "of the roofline", title=self.name)
        for figure in values["figures"]:
            table.add_row(figure["model"], figure["variant"], str(figure["batch"]), *cells(figure))
        console.print(table)
        if "roofline_tflops" in values:
            console.print(f"roofline: {values['roofline_tflops']:.3g} TFLOP/s")
        for name, part in values["parts"].items():
            console.print(f"{name}: {part['outcome']} ({part['seconds']:.0f} s)")
        console.print(f"-> {self.path}", soft_wrap=True)


def cells(figure: JsonObject) -> list[str]:
    """Return the rate, TFLOP/s and share of a figure as text, or its error."""
    if "error" in figure:
        return [figure["error"]]
    return [f"{figure['per_second']:.2f}", f"{figure['tflops']:.3g}", f"{figure['roofline_share']:.1%}"]


def median_rate(rate: Callable[[], float]) -> float:
    """Return the median of some rounds, of one at least."""
    started, rates = time.perf_counter(), [rate()]
    while len(rates) < ROUNDS and time.perf_counter() - started < MAX_SECONDS:
        rates.append(rate())
    return statistics.median(rates)


def count_tflop(run: Callable[[], object]) -> float:
    """Return the TFLOP of a run: matrix products, convolutions and attention; an addition counts too."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() / 1e12


def measure_roofline(device: str) -> float:
    """Return the TFLOP/s of a matrix product: 8192 rows in float16 on a GPU, 512 in float32 on a CPU."""
    size, dtype = (8192, torch.float16) if device == "cuda" else (512, torch.float32)
    left, right = (torch.randn((size, size), device=device, dtype=dtype) for _ in range(2))

    def products() -> float:
        started = time.perf_counter()
        for _ in range(20):
            product = left @ right
        product[0, 0].item()  # waits for the GPU
        return 20 * 2 * size**3 / (time.perf_counter() - started) / 1e12

    products()
    return median_rate(products)
