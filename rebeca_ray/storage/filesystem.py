"""Files and folders by URI, on a disk or in an object store: open, list, remove.

URI -> `open_store` (store.py) -> filesystem and path -> lists, removals, and the errors people see
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pyarrow.fs
from fsspec.implementations.local import LocalFileSystem
from fsspec.spec import AbstractFileSystem

from rebeca_ray.errors import Failure, InputError, StorageError, UserError, describe
from rebeca_ray.storage.local import files_below, remove_with_lock, sync
from rebeca_ray.storage.remote import exact_filesystem
from rebeca_ray.storage.store import classify, failure_types, open_store

PARTICIPLES = {"write": "written", "list": "listed", "remove": "removed", "read": "read"}


def open_filesystem(uri: str) -> tuple[AbstractFileSystem, str]:
    """Return the fsspec filesystem of `uri`, and the path inside it.

    Raises InputError for an unsupported scheme, a store without its client, and an unreachable server.
    """
    store = open_store(uri)
    return store.filesystem, store.path


def is_local(filesystem: AbstractFileSystem) -> bool:
    """Return whether the filesystem is a local disk."""
    return isinstance(filesystem, LocalFileSystem)


def arrow_filesystem(filesystem: AbstractFileSystem) -> pyarrow.fs.FileSystem:
    """Return the same filesystem for pyarrow and Ray Data."""
    return pyarrow.fs.LocalFileSystem() if is_local(filesystem) else exact_filesystem(filesystem)


def join(uri: str, *parts: str) -> str:
    """Return `uri` with `parts` below it."""
    return "/".join([uri.rstrip("/"), *parts])


@contextmanager
def storage_errors(uri: str, action: str = "write") -> Iterator[None]:
    """Raise a StorageError if the store fails, after all retries, to do `action` (a key of PARTICIPLES)."""
    try:
        yield
    except failure_types() as error:
        raise StorageError(
            f"{uri}: cannot be {PARTICIPLES[action]} ({describe(error)}); "
            "check the path, its free space and the credentials"
        ) from None


def list_files(uri: str, suffix: str = "", *, links: bool = True) -> list[str]:
    """Return the files below `uri` that end with `suffix`, sorted, as they are now; none for no folder.

    Without `links`, those behind a link to a folder below `uri` are left out.
    """
    filesystem, path = open_filesystem(uri)
    filesystem.invalidate_cache()
    with storage_errors(uri, "list"):
        names = files_below(path, links=links) if is_local(filesystem) else objects_below(filesystem, path)
    return sorted(
        f"{uri.rstrip('/')}{name.removeprefix(path.rstrip('/'))}" for name in names if name.endswith(suffix)
    )


def objects_below(filesystem: Any, path: str) -> list[str]:
    """Return the objects below a path. s3fs gives the path itself for one that holds no object any more."""
    entries = filesystem.find(path, detail=True)
    return [name for name, entry in entries.items() if entry["type"] != "directory"]


def list_folders(uri: str) -> list[str]:
    """Return the names of the folders directly in `uri`, sorted."""
    filesystem, path = open_filesystem(uri)
    filesystem.invalidate_cache()
    with storage_errors(uri, "list"):
        entries = filesystem.ls(path, detail=True) if filesystem.exists(path) else []
    return sorted(
        str(entry["name"]).rstrip("/").rsplit("/", 1)[-1] for entry in entries if entry["type"] == "directory"
    )


def sync_files(uri: str) -> None:
    """Bring the files below a local folder, which a library wrote, to the disk. Do nothing elsewhere."""
    filesystem, path = open_filesystem(uri)
    if is_local(filesystem):
        with storage_errors(uri):
            for file in Path(path).rglob("*"):
                if file.exists():
                    sync(file)
            sync(Path(path))


def exists(uri: str) -> bool:
    """Return whether there is a file or folder at `uri` now."""
    filesystem, path = open_filesystem(uri)
    filesystem.invalidate_cache()
    with storage_errors(uri, "read"):
        return bool(filesystem.exists(path))


def delete(uri: str) -> None:
    """Remove a file, or a folder and all its files. A missing one is no error."""
    store = open_store(uri)
    store.filesystem.invalidate_cache()
    with storage_errors(uri, "remove"):
        if is_local(store.filesystem):
            remove_tree(Path(store.path))
        else:
            # A name can be that of an object and of a folder. Azure keeps empty folders.
            below = store.filesystem.find(store.path, withdirs=True)
            store.remove([name for name in dict.fromkeys([*reversed(below), store.path]) if "/" in name])


def delete_swapped(uri: str) -> None:
    """Remove an object that compare-and-swap changes, on a disk with its lock file."""
    store = open_store(uri)
    if not is_local(store.filesystem):
        delete(uri)
        return
    with storage_errors(uri, "remove"):
        remove_with_lock(Path(store.path))


def delete_files(uris: list[str]) -> None:
    """Remove files of one store, on S3 many per request. A missing file is no error."""
    if not uris:
        return
    with storage_errors(uris[0], "remove"):
        open_store(uris[0]).remove([open_filesystem(uri)[1] for uri in uris])


def remove_tree(path: Path) -> None:
    """Remove a file or a folder on a disk. Of a link to a folder, the folder's content alone goes.

    Links inside the folder go without their targets.
    """
    if path.is_symlink() and path.is_dir():
        for inner in path.iterdir():
            shutil.rmtree(inner) if inner.is_dir() and not inner.is_symlink() else inner.unlink()
    elif path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_empty_folders(uri: str) -> None:
    """Remove a folder of a disk, its subfolders and its parent, as far as they are empty."""
    filesystem, path = open_filesystem(uri)
    if is_local(filesystem):
        inner = sorted((folder for folder, _, _ in os.walk(path)), key=len, reverse=True)
        for folder in (*inner, os.path.dirname(path.rstrip("/"))):
            with suppress(OSError):  # not empty
                os.rmdir(folder)


def unreadable(name: str, error: BaseException) -> UserError:
    """Return the error for a failed read of `name`.

    A missing or forbidden place is an InputError, because the giver of the path can repair it. Every
    other failure is a StorageError.
    """
    kind = InputError if classify(error) in (Failure.MISSING, Failure.DENIED) else StorageError
    return kind(f"{name}: cannot be read ({describe(error)}); check the path and the credentials")
