"""Run the tests and benchmarks of one GPU, each part in a process of its own and within its time limit.

`tests/gpu/measure.sh` starts this module. A part that fails or is stopped leaves the figures of the others.
"""

import argparse
import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console

from tests.bench.gpu_report import RESULTS, GpuReport

REPO = Path(__file__).parents[2]
WHOLE = 560  # seconds of all parts, so that the whole stays under ten minutes
# tests/conftest.py, with Ray's fixtures, stays out. The engines of TensorRT are measured by a part below.
TESTS = ["pytest", "-q", "-o", "addopts=", "--confcutdir=tests/gpu", "-k", "not tensorrt", "tests/gpu"]
DECODING = "tests.bench.decoding_gpu"
PARTS = {  # a module with its arguments, and its time limit in seconds
    "tests": (TESTS, 110),
    "prior": (["tests.bench.sampling_gpu"], 30),
    "sd15": ([DECODING, "sd15"], 80),
    "sdxl": ([DECODING, "sdxl"], 190),
    "sd15, compiled": ([DECODING, "sd15", "--compile", "--batch-sizes", "16", "1", "32", "4"], 100),
    "sdxl, compiled": ([DECODING, "sdxl", "--compile", "--batch-sizes", "4", "16", "1", "32"], 120),
    "TensorRT": ([DECODING, "sd15", "--tensorrt", "--batch-sizes", "1", "16"], WHOLE),  # the rest
}
NOT_INSTALLED = "TensorRT is not installed"


def run_part(command: list[str], seconds: float) -> str:
    """Run a command, and stop it with all its processes after some seconds; return the outcome."""
    process = subprocess.Popen(command, cwd=REPO, start_new_session=True)
    try:
        status = process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return f"stopped after {seconds:.0f} s"
    return f"failed with exit status {status}" if status else "done"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path)
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    if not arguments.tiny and not torch.cuda.is_available():
        sys.exit("torch sees no NVIDIA GPU; expected one; run it on a machine with a GPU, or give --tiny")
    out = arguments.out or (Path(tempfile.mkdtemp()) if arguments.tiny else RESULTS)
    out.mkdir(parents=True, exist_ok=True)
    report = GpuReport(out.absolute(), tiny=arguments.tiny)
    report.path.unlink(missing_ok=True)
    options = ["--out", str(out.absolute()), *(["--tiny"] if arguments.tiny else [])]
    started = time.monotonic()
    for name, (module, seconds) in PARTS.items():
        if arguments.tiny and name == "sdxl, compiled":
            continue  # one compilation is enough of a trial: it takes a minute on a CPU
        Console().rule(name)
        begun = time.monotonic()
        if name == "TensorRT" and importlib.util.find_spec("tensorrt") is None:
            outcome = NOT_INSTALLED
        else:
            command = [sys.executable, "-m", *module, *(options if module is not TESTS else [])]
            outcome = run_part(command, max(1.0, min(seconds, WHOLE - (begun - started))))
        report.add_part(name, outcome, time.monotonic() - begun)
    report.print()
    outcomes = {part["outcome"] for part in report.read()["parts"].values()}
    sys.exit(bool(outcomes - {"done", NOT_INSTALLED}))


if __name__ == "__main__":
    main()
