"""Check that an output can be written, before the work starts."""

import os
import secrets
from contextlib import suppress
from errno import EIO
from pathlib import Path

from rebeca_ray.errors import Failure, InputError, StorageError, describe
from rebeca_ray.storage.filesystem import exists, is_local, join, list_files, open_filesystem, unreadable
from rebeca_ray.storage.leftovers import remove_partials
from rebeca_ray.storage.objects import read_json
from rebeca_ray.storage.store import classify, failure_types


def require_writable(uri: str, what: str) -> None:
    """Raise UserError, naming `what`, unless a file can be written below `uri`."""
    filesystem, path = open_filesystem(uri)
    probe = f"{path.rstrip('/')}/.write-probe-{secrets.token_hex(8)}"
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
    except failure_types() as error:
        broken_disk = is_local(filesystem) and getattr(error, "errno", None) == EIO
        failed = broken_disk or classify(error) in (Failure.UNREACHABLE, Failure.FULL)
        kind = StorageError if failed else InputError
        remedy = "free some space or mend the store" if failed else "mend its permissions"
        raise kind(
            f"{what} {uri}: cannot be written ({describe(error)}); choose another place or {remedy}"
        ) from None
    finally:
        for folder in missing:  # a job that fails later leaves no empty folder behind
            with suppress(OSError):
                folder.rmdir()


def require_new_parquet(out: str) -> None:
    """Raise UserError unless `out`, an absolute path or an address, may become a new Parquet file.

    Removes the partial files of `out` that writers left, if they were killed an hour ago.
    """
    if not out.endswith(".parquet"):
        raise InputError(f"out {out}: the output is a Parquet file; give a name that ends with .parquet")
    if exists(out):
        raise InputError(f"out {out}: already exists; remove it, or give another name")
    require_writable(out.rpartition("/")[0] or "/", "out")
    remove_partials(out)


def require_own(uri: str, what: str, markers: dict[str, str]) -> None:
    """Raise UserError unless `uri` holds no file, or one of the JSON `markers` in it has its key.

    The job replaces it. Empty folders do not count: some stores keep those of removed objects for a while.
    """
    if any(key in (read_json(join(uri, name)) or {}) for name, key in markers.items()):
        return
    filesystem, path = open_filesystem(uri)
    try:
        occupied = filesystem.isfile(path) or list_files(uri)
    except failure_types() as error:
        raise unreadable(f"{what} {uri}", error) from None
    if occupied:
        raise InputError(
            f"{what} {uri}: holds something else (no {' or '.join(markers)} of ours) and would be replaced; "
            "choose another folder"
        )
