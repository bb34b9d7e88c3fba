"""Check the machine: one finding per part, with the remedy where something is missing.

Parts that every job needs are required. The others say which command needs them.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path

from rebeca_ray.errors import UserError, describe
from rebeca_ray.ray_start import MIN_FREE_BYTES

GIB = 2**30
DISK, MEMORY, SHARED_MEMORY = 10 * GIB, 6 * GIB, 2 * GIB  # that the demo needs, with a margin
PYTHONS = ((3, 11), (3, 14))  # the first that works, and the first that does not
MEMORY_LIMIT = Path("/sys/fs/cgroup/memory.max")  # of a container
JAVA = 17  # the oldest that Spark 4 runs on
EXTRAS = {  # module -> the extra that brings it, and its use
    "onnxruntime": ("onnx", "decoder.engine onnx, and `rebeca export`"),
    "openvino": ("openvino", "decoder.engine openvino"),
    "c2pa": ("c2pa", "signed images"),
    "uvicorn": ("gallery", "`rebeca gallery`"),
    "gcsfs": ("gcs", "catalogs in gs://"),
    "adlfs": ("azure", "catalogs in abfss://"),
}


@dataclass(frozen=True, kw_only=True)
class Finding:
    """The state of one part: `ok`, `missing` (something optional is), or `broken` (no job runs)."""

    part: str
    state: str
    detail: str
    remedy: str = ""


def examine(catalog: str | None = None) -> list[Finding]:
    """Return the findings of this machine, and of a catalog's store if one is given."""
    checks: dict[str, Callable[[], Finding]] = {
        "Python": python,
        "torch": torch,
        "GPU": gpu,
        "Ray": ray,
        "machine": processor_and_memory,
        "disk": disk,
        "shared memory": shared_memory,
        "Triton": triton,
        "Java": java,
    }
    checks |= {f"extra {name}": partial(extra, module) for module, (name, _) in EXTRAS.items()}
    if catalog:
        checks["store"] = partial(store, catalog)
    return [examined(part, check) for part, check in checks.items()]


def examined(part: str, check: Callable[[], Finding]) -> Finding:
    """Return the finding of a check, also of one that the machine makes impossible."""
    try:
        return check()
    except (OSError, subprocess.SubprocessError) as error:
        return Finding(part=part, state="missing", detail=str(error), remedy="mend what the message names")


def python() -> Finding:
    first, end = PYTHONS
    version = ".".join(map(str, sys.version_info[:3]))
    if first <= sys.version_info[:2] < end:
        return Finding(part="Python", state="ok", detail=f"{version} in {sys.prefix}")
    return Finding(part="Python", state="broken", detail=version, remedy="install Python 3.11, 3.12 or 3.13")


def torch() -> Finding:
    try:
        import torch as library

        from rebeca_ray.decoder.choices import computes_bfloat16
    except (ImportError, OSError) as error:
        return Finding(
            part="torch",
            state="broken",
            detail=describe(error),
            remedy="run `make setup` again",
        )
    instructions = library.backends.cpu.get_cpu_capability()
    bfloat16 = "computes bfloat16" if computes_bfloat16() else "without bfloat16"
    return Finding(
        part="torch", state="ok", detail=f"{library.__version__}, processor {instructions}, {bfloat16}"
    )


def gpu() -> Finding:
    try:
        import torch as library

        if library.cuda.is_available():
            names = [library.cuda.get_device_name(number) for number in range(library.cuda.device_count())]
            return Finding(part="GPU", state="ok", detail=", ".join(names))
    except (ImportError, OSError, RuntimeError) as error:
        return Finding(
            part="GPU", state="missing", detail=describe(error), remedy="mend NVIDIA's driver, or use the CPU"
        )
    return Finding(
        part="GPU",
        state="missing",
        detail="torch sees none",
        remedy="set device: cpu, or install NVIDIA's driver; a CPU takes minutes for a large image",
    )


def ray() -> Finding:
    try:
        version = metadata.version("ray")
    except metadata.PackageNotFoundError:
        return Finding(part="Ray", state="broken", detail="is not installed", remedy="run `make setup`")
    address = os.environ.get("RAY_ADDRESS")
    detail = f"{version}, {f'joins {address}' if address else 'starts on this machine'}"
    folder = existing(Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()))
    if shutil.disk_usage(folder).free < MIN_FREE_BYTES:
        return Finding(
            part="Ray",
            state="broken",
            detail=f"{detail}; {folder} is full",
            remedy="free some space there, or set RAY_TMPDIR to another folder",
        )
    return Finding(part="Ray", state="ok", detail=detail)


def processor_and_memory() -> Finding:
    total = memory()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    detail = f"{cores} CPU cores, {gib(total)} of memory"
    if cores >= 2 and total >= MEMORY:
        return Finding(part="machine", state="ok", detail=detail)
    return Finding(
        part="machine", state="missing", detail=detail, remedy=f"the demo needs 2 cores and {gib(MEMORY)}"
    )


def disk() -> Finding:
    folder = existing(Path.home())
    free = shutil.disk_usage(folder).free
    detail = f"{gib(free)} free in {folder}"
    if free >= DISK:
        return Finding(part="disk", state="ok", detail=detail)
    return Finding(part="disk", state="missing", detail=detail, remedy=f"the demo needs {gib(DISK)}")


def shared_memory() -> Finding:
    folder = Path("/dev/shm")
    if not folder.is_dir():
        return Finding(part="shared memory", state="ok", detail="Ray takes a temporary folder on this system")
    size = shutil.disk_usage(folder).total
    if size >= SHARED_MEMORY:
        return Finding(part="shared memory", state="ok", detail=f"{gib(size)} in {folder}")
    return Finding(
        part="shared memory",
        state="missing",
        detail=f"{gib(size)} in {folder}",
        remedy=f"Ray becomes slow; in a container, set --shm-size={SHARED_MEMORY // GIB}g or more",
    )


def triton() -> Finding:
    from rebeca_ray.decoder.triton_server import find_server

    try:
        with tempfile.TemporaryDirectory() as folder:
            binary, _, _ = find_server(Path(folder))
    except UserError as error:
        reason, _, remedy = str(error).partition("; ")
        return Finding(
            part="Triton", state="missing", detail=reason, remedy=f"for `rebeca serve` alone: {remedy}"
        )
    return Finding(part="Triton", state="ok", detail=binary)


def java() -> Finding:
    binary = shutil.which("java")
    remedy = f"install Java {JAVA} or newer; only Spark needs it"
    if binary is None:
        return Finding(part="Java", state="missing", detail="is not on PATH", remedy=remedy)
    answer = subprocess.run([binary, "-version"], capture_output=True, text=True, check=False, timeout=60)
    lines = (answer.stderr or answer.stdout).splitlines() or [""]
    version = re.search(r'version "(\d+)', lines[0])
    if version is None or int(version[1]) < JAVA:
        return Finding(part="Java", state="missing", detail=lines[0] or "does not start", remedy=remedy)
    return Finding(part="Java", state="ok", detail=lines[0])


def extra(module: str) -> Finding:
    name, use = EXTRAS[module]
    if importlib.util.find_spec(module) is not None:
        return Finding(part=f"extra {name}", state="ok", detail=f"for {use}")
    return Finding(
        part=f"extra {name}",
        state="missing",
        detail=f"needed for {use}",
        remedy=f"pip install 'rebeca-ray[{name}]'",
    )


def store(catalog: str) -> Finding:
    """Check that a catalog's store answers, takes writes, and compares before it swaps."""
    from rebeca_ray.storage.swap_probe import require_swaps
    from rebeca_ray.storage.writable import require_writable

    try:
        require_writable(catalog, "catalog")
        require_swaps(catalog)
    except UserError as error:
        reason, _, remedy = str(error).partition("; ")
        return Finding(part="store", state="broken", detail=reason, remedy=remedy)
    return Finding(part="store", state="ok", detail=f"{catalog}: takes writes, and compares before it swaps")


def memory() -> int:
    """Return the bytes of memory of the machine, or of the container that limits it."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with suppress(OSError, ValueError):  # the limit may be "max"
        return min(total, int(MEMORY_LIMIT.read_text()))
    return total


def existing(folder: Path) -> Path:
    """Return a folder, or the nearest one above it that exists."""
    return next(path for path in (folder, *folder.parents) if path.exists())


def gib(size: int) -> str:
    return f"{size / GIB:.0f} GiB"
