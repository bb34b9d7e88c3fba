"""The whole main job after installation: seconds of each phase, rates, peak memory and the truth check.

`python tests/bench/main_job.py [--users 2000]` runs `rebeca demo` in a temporary folder and writes
`tests/bench/results/main_job-<processor>.json`. Peak memory is the rise of the machine's used memory
(MemTotal - MemAvailable), sampled twice per second. It includes Ray's object store, servers and workers.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch


def used_memory() -> int:
    """Return the bytes of memory in use on this machine."""
    meminfo = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return 1024 * (int(meminfo["MemTotal"].split()[0]) - int(meminfo["MemAvailable"].split()[0]))


def processor() -> str:
    match = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return match[1].strip() if match else "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--users", type=int, help="simulated users; default: that of the demo")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        command = [
            str(Path(sys.executable).parent / "rebeca"),
            "demo",
            "--out",
            f"{folder}/demo",
            "--data",
            f"{folder}/data",
            *(["--users", str(arguments.users)] if arguments.users else []),
        ]
        before, peak, started = used_memory(), 0, time.perf_counter()
        demo = subprocess.Popen(command)
        while demo.poll() is None:
            peak = max(peak, used_memory() - before)
            time.sleep(0.5)
        if demo.returncode:
            sys.exit(demo.returncode)
        seconds = time.perf_counter() - started
        figures = json.loads((Path(folder) / "demo" / "figures.json").read_text())
    capability = torch.backends.cpu.get_cpu_capability()
    result = {
        "machine": {
            "processor": processor(),
            "vector_instructions": capability,
            "cores": torch.get_num_threads(),
        },
        "seconds_in_all": round(seconds, 1),
        "peak_memory_gb": round(peak / 1e9, 2),
        **figures,
    }
    name = re.sub(r"\W+", "-", f"{processor()} {capability}").strip("-").lower()
    path = Path(__file__).parent / "results" / f"main_job-{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(f"{seconds:.0f} s in all, peak memory {peak / 1e9:.2f} GB -> {path}")


if __name__ == "__main__":
    main()
