"""Start Ray on this machine, or join a cluster. Each failure is one line with its remedy.

A Ray that starts here listens on loopback alone. Only its user may read its token, `~/.ray/auth_token`.
A Ray that other machines reach is joined only if it asks for a token.
"""

import errno
import fcntl
import logging
import os
import secrets
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from rebeca_ray.errors import InputError, ResumableError, UserError, describe

PROBE_SECONDS, PROBES_LAST = 5, 20  # of one connection to a cluster's address, and of all tries together
GCS_WAIT = "RAY_gcs_server_port_wait_time_s"  # tries of 40 s to reach a cluster; Ray's default is 20 of them
GCS_PORT = "RAY_GCS_SERVER_PORT"
MIN_FREE_BYTES = 200 * 2**20  # in the temporary folder: Ray's logs and sockets, without spilled objects
UNUSABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)
LOOPBACK = ("localhost", "127.0.0.1", "::1")
TOO_LONG = "AF_UNIX path length"
CLIENT_PORT = 10001  # of `ray://host`
ALLOW_OPEN = "REBECA_ALLOW_OPEN_RAY"  # 1: join a cluster that takes commands without a token
log = logging.getLogger(__name__)


def connect() -> None:
    """Join the cluster of `RAY_ADDRESS` or of this machine; if there is none, start Ray here.

    Raises InputError for a setting, a machine or an open cluster that a person must change, and
    ResumableError for a cluster that does not answer within a minute.
    """
    import ray
    from ray._private import services

    # Its warning matters only to a Ray that listens to other machines.
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
    address = os.environ.get("RAY_ADDRESS") or None
    find: Any = services.canonicalize_bootstrap_address  # None: start here
    try:
        stay_on_loopback(False)
        cluster = address if is_client(address) else find(address)
        if cluster and is_here(address) and not listens(cluster):
            stay_on_loopback(True)  # one that another job started
            cluster = find(address)
        if address is None and cluster and not listens(cluster):
            log.warning("a Ray at %s was killed and left its address; another starts here", cluster)
            address, cluster = "local", None
        if cluster is None:
            check_temporary_folder()
            protect_token()
            stay_on_loopback(True)
        else:
            await_answer(cluster)
            refuse_open(cluster)
            os.environ.setdefault(GCS_WAIT, "1")
        with nullcontext() if cluster else address_for_workers():
            ray.init(
                address=address if cluster else "local", log_to_driver=True, logging_level=logging.WARNING
            )
    except UserError:
        raise
    except Exception as error:  # its type depends on the part of Ray that failed
        raise explained(error, address) from None


@contextmanager
def address_for_workers() -> Iterator[None]:
    """Choose the address of a Ray that starts here in the block; all its processes find it in RAY_ADDRESS.

    Ray Train's cleaner, which frees the CPUs of a killed training, would look for a Ray on this machine.
    Where several run it fails, or asks another one, which knows nothing of the training.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    chosen = {GCS_PORT: port, "RAY_ADDRESS": f"127.0.0.1:{port}"}
    before = {name: os.environ.get(name) for name in chosen}
    os.environ.update(chosen)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def is_client(address: str | None) -> bool:
    return address is not None and "://" in address


def is_here(address: str | None) -> bool:
    """Return whether an address means this machine."""
    return address in (None, "auto") or urlsplit(f"ray://{address}").hostname in LOOPBACK


def stay_on_loopback(only: bool) -> None:
    """Make this machine's address 127.0.0.1 for Ray, or the one that other machines reach.

    Ray's switch, whose name is of other systems, holds on every system. Its processes read the environment.
    """
    from ray._private import ray_constants

    ray_constants.ENABLE_RAY_CLUSTER = not only
    if only:
        os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR] = "0"
    else:
        os.environ.pop(ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR, None)


def protect_token() -> None:
    """Make Ray's token file private, and fill one that is missing or empty.

    Ray would fill it too. But of two that start at once, each would write a token, and one of them would
    know a token that is in no file any more. Raises InputError if the file cannot be made or changed.
    """
    elsewhere = os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")
    if elsewhere or os.environ.get("RAY_AUTH_MODE", "token").lower() != "token":
        return
    token = Path.home() / ".ray" / "auth_token"
    try:
        token.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        token.touch(mode=0o600)
        if token.stat().st_mode & 0o077:
            token.chmod(0o600)
        if token.stat().st_size == 0:
            with token.open("r+") as file:
                fcntl.flock(file, fcntl.LOCK_EX)  # until it is closed
                if not file.read():
                    file.write(secrets.token_hex(32))
    except OSError as error:
        raise InputError(
            f"HOME {Path.home()}: Ray's token {token} cannot be written ({describe(error)}); "
            "set HOME to a writable folder, or the token in RAY_AUTH_TOKEN"
        ) from None


def temporary_folder() -> Path:
    return Path(os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp")


def check_temporary_folder() -> None:
    """Raise InputError unless Ray's temporary folder can be written and has space."""
    folder = temporary_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise temporary_folder_fails(describe(error)) from None
    if free < MIN_FREE_BYTES:
        raise temporary_folder_fails(f"{free / 2**20:.0f} MiB free, Ray needs {MIN_FREE_BYTES / 2**20:.0f}")


def temporary_folder_fails(reason: str) -> InputError:
    return InputError(
        f"Ray's temporary folder {temporary_folder()}: cannot be used ({reason}); "
        "free space there, or set RAY_TMPDIR to another folder with a short path"
    )


def await_answer(address: str) -> None:
    """Return once something listens at a cluster's address. Raises ResumableError if nothing does soon."""
    deadline = time.monotonic() + PROBES_LAST
    while True:
        try:
            probe(address)
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise no_answer(address, describe(error)) from None
            time.sleep(1)


def probe(address: str) -> None:
    """Raise OSError unless something listens at `host:port` or `ray://host:port` (by default CLIENT_PORT)."""
    parts = urlsplit(address if "://" in address else f"ray://{address}")
    socket.create_connection((parts.hostname or "", parts.port or CLIENT_PORT), timeout=PROBE_SECONDS).close()


def listens(address: str) -> bool:
    try:
        probe(address)
    except OSError:
        return False
    return True


def refuse_open(address: str) -> None:
    """Raise InputError for a cluster that other machines reach and that answers without a token.

    Whoever reaches such a cluster can run code on it. A Ray on loopback counts as closed, and one with TLS,
    which asks for certificates. Raises ResumableError for a cluster that does not answer.
    """
    parts = urlsplit(address if is_client(address) else f"ray://{address}")
    tls = os.environ.get("RAY_USE_TLS", "").lower() in ("1", "true")
    if parts.hostname in LOOPBACK or tls or os.environ.get(ALLOW_OPEN) == "1":
        return
    import grpc
    from ray.core.generated import gcs_service_pb2, ray_client_pb2
    from ray.core.generated.gcs_service_pb2_grpc import NodeInfoGcsServiceStub
    from ray.core.generated.ray_client_pb2_grpc import RayletDriverStub

    gcs: Any = gcs_service_pb2
    client: Any = ray_client_pb2
    # Ray, too, connects without a proxy.
    options = [("grpc.enable_http_proxy", 0)]
    target = parts.netloc if parts.port else f"{parts.netloc}:{CLIENT_PORT}"
    with grpc.insecure_channel(target, options) as channel:
        try:
            if is_client(address):
                request = client.ClusterInfoRequest(type=client.ClusterInfoType.PING)
                RayletDriverStub(channel).ClusterInfo(request, timeout=PROBES_LAST)
            else:
                NodeInfoGcsServiceStub(channel).CheckAlive(gcs.CheckAliveRequest(), timeout=PROBES_LAST)
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.UNAUTHENTICATED:
                return
            raise no_answer(address, describe(Exception(error.details()))) from None
    raise InputError(
        f"Ray at {address}: takes commands without a token, so whoever reaches it can run code there; "
        f"start it with RAY_AUTH_MODE=token, or set {ALLOW_OPEN}=1 if its network is closed"
    )


def no_answer(address: str, reason: str) -> ResumableError:
    return ResumableError(
        f"RAY_ADDRESS {address}: no Ray answers there ({reason}); "
        "start that cluster, or unset RAY_ADDRESS to start Ray here"
    )


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and its causes, the outermost first."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def explained(error: BaseException, address: str | None) -> UserError:
    """Return the error to raise for a failure of Ray's start."""
    causes = list(chain(error))
    text = " ".join(" ".join(str(cause).split()) for cause in causes)
    name = f"Ray at {address}" if address else "Ray"
    if "no authentication token was found" in text:
        return InputError(
            f"{name}: asks for a token, and none is set; "
            "copy the cluster's token to ~/.ray/auth_token, or give it in RAY_AUTH_TOKEN"
        )
    if "token is invalid" in text or "nauthenticated" in text or "InvalidAuthToken" in text:
        return InputError(
            f"{name}: refuses the token; copy the cluster's token to ~/.ray/auth_token, "
            "or give it in RAY_AUTH_TOKEN"
        )
    if "ersion mismatch" in text:
        return InputError(
            f"{name}: runs other versions of Ray or Python ({versions_in(text)}); "
            "install the same versions here and there"
        )
    if TOO_LONG in text:
        return temporary_folder_fails("its path is too long for a socket")
    for cause in causes:
        if isinstance(cause, OSError) and cause.errno in UNUSABLE:
            return temporary_folder_fails(describe(cause))
    if address == "auto":
        return InputError(
            "RAY_ADDRESS auto: no Ray runs on this machine; start one, or unset RAY_ADDRESS to start Ray here"
        )
    if isinstance(error, ValueError):
        return InputError(f"RAY_ADDRESS {address}: {describe(error)}; give host:port, auto or local")
    if address not in (None, "local") and isinstance(error, ConnectionError):
        return no_answer(address or "", describe(error))
    return ResumableError(
        f"{name}: could not be started or joined ({describe(error).split('. ')[0]}); "
        "look at RAY_ADDRESS and the machine's load, start again"
    )


def versions_in(text: str) -> str:
    """Return the versions that Ray's message compares."""
    return text.partition("ersion mismatch")[2].lstrip(": ")[:200]
