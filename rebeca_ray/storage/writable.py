"""May an output be written where it is wanted? Asked before the work, not after it."""

import os
from contextlib import suppress
from pathlib import Path

from rebeca_ray.errors import InputError, describe
from rebeca_ray.storage.filesystem import UNREACHABLE, is_local, join, open_filesystem
from rebeca_ray.storage.objects import read_json


def require_writable(uri: str, what: str) -> None:
    """Raise UserError, naming `what`, unless something can be written below `uri`."""
    filesystem, path = open_filesystem(uri)
    probe = f"{path.rstrip('/')}/.write-probe-{os.getpid()}"
    missing = [
        folder
        for folder in (Path(path), *Path(path).parents)
        if is_local(filesystem) and not os.path.lexists(folder)
    ]
    try:
        if missing:
            Path(path).mkdir(parents=True)
        filesystem.pipe_file(probe, b"")
        filesystem.rm_file(probe)
    except UNREACHABLE as error:
        raise InputError(
            f"{what} {uri}: cannot be written ({describe(error)}); choose another place or mend its permissions"
        ) from None
    finally:
        for folder in missing:  # the job that fails later leaves no empty one behind
            with suppress(OSError):
                folder.rmdir()


def require_own(uri: str, what: str, marker: str, key: str) -> None:
    """Raise UserError unless `uri` is empty or holds a JSON `marker` with `key`: it will be replaced."""
    filesystem, path = open_filesystem(uri)
    try:
        occupied = filesystem.exists(path) and (filesystem.isfile(path) or filesystem.ls(path))
    except UNREACHABLE as error:
        raise InputError(
            f"{what} {uri}: cannot be read ({describe(error)}); check the path and the credentials"
        ) from None
    if occupied and key not in (read_json(join(uri, marker)) or {}):
        raise InputError(
            f"{what} {uri}: holds something else (no {marker} of ours) and would be replaced; choose another folder"
        )
