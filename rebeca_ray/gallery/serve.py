"""Serve the gallery from this process until it is interrupted."""

import ipaddress
import os
import secrets
import socket
from dataclasses import dataclass

import uvicorn

from rebeca_ray.errors import InputError
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


def listen(host: str, port: int, names: list[str]) -> Listening:
    """Open a port. Beyond this machine, a token is needed. Raises InputError if the port is taken.

    `names` are further names by which browsers reach the server.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        server = socket.create_server((host, port), family=family)
    except OSError as error:
        raise InputError(
            f"gallery: {host}:{port} cannot be opened ({error.strerror or error}); "
            "give another --port or --host"
        ) from None
    token = None if is_loopback(host) else os.environ.get(TOKEN) or secrets.token_urlsafe(24)
    hosts = [*LOOPBACK, *names] if is_loopback(host) else [host, socket.gethostname(), *names]
    shown = names[0] if names else socket.gethostname() if is_any(host) else host
    shown = f"[{shown}]" if ":" in shown else shown
    query = f"?token={token}" if token else ""
    return Listening(server, hosts, token, f"http://{shown}:{server.getsockname()[1]}/{query}")


def serve(gallery: Gallery, listening: Listening) -> None:
    """Answer requests until SIGINT or SIGTERM."""
    app = build_app(gallery, listening.hosts, listening.token)
    # Without the access log, which would hold tokens and the ids of users.
    config = uvicorn.Config(app, log_level="warning", access_log=False, server_header=False)
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
