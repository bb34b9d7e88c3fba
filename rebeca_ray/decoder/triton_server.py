"""Run Triton Inference Server with the decoder on this machine: its model repository and its process."""

import importlib.util
import os
import secrets
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig, ModelInstanceGroup

from rebeca_ray.config.decoder import DecoderSettings
from rebeca_ray.config.fields import PACKAGE
from rebeca_ray.decoder.files import identify_decoder
from rebeca_ray.decoder.triton_client import parameters
from rebeca_ray.errors import InputError

CLOSED_APIS = "shared-memory,trace,logging"


@contextmanager
def triton_server(
    settings: DecoderSettings, *, http_port: int, grpc_port: int, metrics_port: int, instances: int
) -> Iterator[Any]:
    """Run `tritonserver` on 127.0.0.1. It is ready on entry and stopped on exit; yields its process.

    Raises InputError if this machine has no server, if a port is taken, or if the server stops before it is
    ready. The server's output then has the reason.
    """
    with tempfile.TemporaryDirectory(prefix="rebeca-triton-") as folder:
        write_repository(settings, Path(folder) / "models", instances)
        binary, environment, options = find_server(Path(folder))
        ports = {"http": http_port, "grpc": grpc_port, "metrics": metrics_port}
        require_free(ports)
        command = [binary, f"--model-repository={folder}/models", "--model-control-mode=none", *options]
        command += [
            option
            for name, port in ports.items()
            for option in (f"--{name}-port={port}", f"--{name}-address=127.0.0.1")
        ]
        process = subprocess.Popen(
            [*command, *closed_apis(), "--disable-auto-complete-config", "--exit-timeout-secs=20"],
            env=os.environ | environment,
        )
        try:
            wait_until_ready(process, http_port)
            yield process
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def closed_apis() -> list[str]:
    """Return the options that close what our client never calls, behind a key that nobody learns.

    A caller of shared memory reads and writes this machine's memory, and one of traces and logs writes files.
    """
    key = f"{CLOSED_APIS}:closed={secrets.token_hex(16)}"
    return [f"--http-restricted-api={key}", f"--grpc-restricted-protocol={key}"]


def require_free(ports: dict[str, int]) -> None:
    """Raise InputError for a port that is taken: its server would look like ours, and ready."""
    for name, port in ports.items():
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                raise InputError(
                    f"--{name}-port {port}: another process listens there; stop it, or give another port"
                ) from None


def wait_until_ready(process: "subprocess.Popen[bytes]", http_port: int) -> None:
    """Return once every model is loaded and warm. Raises InputError if the process ends earlier."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while process.poll() is None:
        try:
            with direct.open(f"http://127.0.0.1:{http_port}/v2/health/ready", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise InputError(
        f"tritonserver ended with code {process.returncode} before it was ready; "
        "its log above gives the reason"
    )


def write_repository(settings: DecoderSettings, folder: Path, instances: int = 1) -> None:
    """Copy the model repository into `folder`, with the settings and sizes of this decoder in its config.

    A folder that an earlier try left is filled again. Raises InputError for a decoder that does not load.
    """
    identity = identify_decoder(settings)
    template = next(
        path
        for path in (PACKAGE / "model_repository", PACKAGE.parent / "serving" / "model_repository")
        if path.is_dir()
    )
    shutil.copytree(template, folder, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)
    path = folder / "decoder" / "config.pbtxt"
    config = text_format.Parse(path.read_text(), ModelConfig())
    config.max_batch_size = settings.batch_size
    config.instance_group[0].count = instances
    config.instance_group[0].kind = (
        ModelInstanceGroup.KIND_GPU if settings.device == "cuda" else ModelInstanceGroup.KIND_CPU
    )
    config.input[0].dims[:] = [identity.embed_dim]
    config.model_warmup[0].inputs["image_embeds"].dims[:] = [identity.embed_dim]
    config.parameters.clear()
    for key, value in parameters(settings).items():
        config.parameters[key].string_value = value
    config.parameters["fingerprint"].string_value = identity.fingerprint(settings)
    path.write_text(text_format.MessageToString(config))


def find_server(folder: Path) -> tuple[str, dict[str, str], list[str]]:
    """Return `(binary, environment, options)` of the container's server, or of the nvidia-pytriton wheel's.

    The wheel has a stub of the Python backend per version of Python; this Python's is copied into `folder`.
    Raises InputError if neither is installed.
    """
    site_packages = sysconfig.get_paths()["purelib"]
    environment = {
        "PYTHONPATH": os.pathsep.join([str(PACKAGE.parent), site_packages, os.environ.get("PYTHONPATH", "")])
    }
    if binary := shutil.which("tritonserver", path=f"{os.environ['PATH']}{os.pathsep}/opt/tritonserver/bin"):
        return binary, environment, []
    package = importlib.util.find_spec("pytriton")
    if package is None or package.submodule_search_locations is None:
        raise InputError(
            "serve: no tritonserver on PATH or in /opt/tritonserver; run this in NVIDIA's Triton container "
            "(26.07 or newer), or, to try it out, `pip install --no-deps nvidia-pytriton`"
        )
    wheel = Path(next(iter(package.submodule_search_locations))) / "tritonserver"
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    backend = folder / "backends" / "python"
    shutil.copytree(wheel / "backends" / "python", backend)
    shutil.copy(wheel / "python_backend_stubs" / version / "triton_python_backend_stub", backend)
    (backend / "triton_python_backend_stub").chmod(0o755)
    libraries = [str(Path(site_packages) / "nvidia_pytriton.libs"), str(sysconfig.get_config_var("LIBDIR"))]
    environment["LD_LIBRARY_PATH"] = os.pathsep.join(libraries)
    return str(wheel / "bin" / "tritonserver"), environment, [f"--backend-directory={folder / 'backends'}"]
