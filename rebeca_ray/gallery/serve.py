"""Serve the gallery from this process until it is interrupted."""

import ipaddress
import os
import secrets
import socket
from dataclasses import dataclass
from urllib.parse import urlencode, urlsplit

import uvicorn

from rebeca_ray.errors import InputError, describe
from rebeca_ray.gallery.app import Gallery, build_app
from rebeca_ray.gallery.guard import LOOPBACK

TOKEN = "REBECA_GALLERY_TOKEN"  # for a fixed one; by default each start makes its own


@dataclass(frozen=True)
class Listening:
    """An open port and the address for browsers, which has the token if one is needed."""

    server: socket.socket
    hosts: list[str]
    token: str | None
    url: str


def parse_bind(bind: str) -> tuple[str, int]:
    """Return the host and the port of `HOST:PORT`, with 8400 for a missing port."""
    try:
        parts = urlsplit(f"//{bind}")
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if host is None or parts.netloc != bind:
        raise InputError(f"--bind {bind}: is no HOST:PORT; give such as 127.0.0.1:8400 or [::1]:8400")
    return host, 8400 if port is None else port


def listen(host: str, port: int, names: list[str], *, writes: bool = False) -> Listening:
    """Open a port. Raises InputError if that is not possible.

    `names` are further names of this server for browsers. With names, beyond this machine, and for a gallery
    that `writes` votes, a token is needed.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        server = socket.create_server((host, port), family=family)
    except (OSError, UnicodeError) as error:
        raise InputError(
            f"gallery: {host}:{port} cannot be opened ({describe(error)}); give another address with --bind"
        ) from None
    token = fixed = os.environ.get(TOKEN)
    if token is None and (names or writes or not is_loopback(host)):
        token = secrets.token_urlsafe(24)
    hosts = [host, *names]
    if is_loopback(host) or is_any(host):
        hosts += LOOPBACK
    if not is_loopback(host):
        hosts.append(socket.gethostname())
    shown = names[0] if names else socket.gethostname() if is_any(host) else host
    shown = f"[{shown}]" if ":" in shown else shown
    query = f"?{urlencode({'token': token})}" if token else ""
    query = f"?token=${TOKEN}" if fixed else query  # a log may keep what is printed
    return Listening(server, hosts, token, f"http://{shown}:{server.getsockname()[1]}/{query}")


def serve(gallery: Gallery, listening: Listening) -> None:
    """Answer requests until SIGINT or SIGTERM."""
    app = build_app(gallery, listening.hosts, listening.token)
    config = uvicorn.Config(
        app,
        log_config=None,  # its setup closes the handlers of every other library of the process
        log_level="warning",
        access_log=False,  # it would hold tokens and the ids of users
        server_header=False,
        timeout_graceful_shutdown=1,
    )
    uvicorn.Server(config).run(sockets=[listening.server])


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def is_any(host: str) -> bool:
    """Return whether a server at this address listens on all of the machine's addresses."""
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False
