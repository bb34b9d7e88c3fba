"""What the pipeline wastes: each stage beside a bare loop around the same model, start-up excluded.

    python -m tests.bench.pipeline [--data ~/rebeca-stickers] [--only gaps ramp render embed plan write]

gaps    the share of the time between the calls of a decoder that only sleeps; 10,000 JPEGs of 63 kB
ramp    images per second of four sleeping decoders / of one; seconds to the first call and to the full pool
render  images per second of a pass with the bundled decoder / of a loop; 1,000 images
embed   images per second of `rebeca embed` / of an open_clip loop; stickers of 64 pixels, photos of 512
plan    items per second of planning / of a loop that only samples; the world of an earlier `rebeca demo`
write   rows per second of the images table / of Ray's `write_parquet`, and of pyarrow alone

Models have one thread, on one core, and the rest has the other cores. Arms alternate, each in a process of
its own; the figures are medians. Each part replaces its own entry in `tests/bench/results/pipeline.json`.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from tests.bench.main_job import processor

RESULTS = Path(__file__).parent / "results" / "pipeline.json"


def arm(module: str, *arguments: str) -> dict[str, Any]:
    """Run one arm in a process of its own; return the figures that it prints."""
    command = [sys.executable, "-m", f"tests.bench.waste.{module}", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment).stdout
    figures: dict[str, Any] = json.loads(output.splitlines()[-1])
    print(module, *arguments, figures, flush=True)
    return figures


def in_turn(module: str, rate: str, rounds: int, *rest: str) -> dict[str, Any]:
    """Measure a pass and a loop in turn; return both rates, their ratio, and the last pass's figures."""
    passes, loops = [], []
    for _ in range(rounds):
        passes.append(arm(module, "pass", *rest))
        loops.append(arm(module, "loop", *rest)[rate])
    rates = {"pass": median(figures[rate] for figures in passes), "loop": median(loops)}
    return {**rates, "ratio": rates["pass"] / rates["loop"], "rounds": rounds, "pass_details": passes[-1]}


def measure(part: str, data: str, rounds: int) -> dict[str, Any]:
    if part == "gaps":
        figures = arm("render", "gaps", "10000")
        return {"gaps": 1 - figures["busy_share"], **figures}
    if part == "ramp":
        one, four = arm("render", "gaps", "640", "0.64", "1"), arm("render", "gaps", "6400", "0.64", "4")
        rate = "images_per_second_of_full_pool"
        return {"ratio": four[rate] / one[rate], "one": one, "four": four}
    if part == "render":
        return in_turn("render", "images_per_second", rounds, "1000")
    if part == "embed":
        counts = {"stickers": "8000", "photos": "1500"}
        return {
            kind: in_turn("embed", "images_per_second", rounds, kind, count) for kind, count in counts.items()
        }
    if part == "plan":
        return in_turn("plan", "items_per_second", rounds, data, "20")
    on_ray, alone = arm("write", "ray", "40000"), arm("write", "alone", "2500")
    return {
        "on_ray": {**on_ray, "ratio": on_ray["ours"] / on_ray["ray"]},
        "alone": {**alone, "ratio": alone["ours"] / alone["pyarrow"]},
    }


def ratios(figures: dict[str, Any], path: tuple[str, ...] = ()) -> list[tuple[str, float]]:
    """Return all ratios below some figures, with their paths."""
    pairs = []
    for name, value in figures.items():
        if isinstance(value, dict):
            pairs += ratios(value, (*path, name))
        elif name in ("ratio", "gaps"):
            pairs.append((" ".join((*path, name)), value))
    return pairs


def main() -> None:
    parts = ["gaps", "ramp", "render", "embed", "plan", "write"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", default=str(Path("~/rebeca-stickers").expanduser()))
    parser.add_argument("--only", nargs="+", choices=parts, default=parts)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results["device"] = f"{os.cpu_count()} cores of {processor()}, {torch.backends.cpu.get_cpu_capability()}"
    for part in arguments.only:
        results[part] = measure(part, arguments.data, arguments.rounds)
        RESULTS.write_text(json.dumps(results, indent=2) + "\n")
    table = Table("part", "share")
    for name, share in ratios(results):
        table.add_row(name, f"{share:.3f}")
    Console().print(table)


if __name__ == "__main__":
    main()
