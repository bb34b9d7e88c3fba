"""Leftovers of crashes: partial files, probes and unfinished uploads that no process will complete."""

import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

from rebeca_ray.storage.failures import only_warn
from rebeca_ray.storage.filesystem import delete_files, is_local, storage_errors
from rebeca_ray.storage.local import PARTIAL
from rebeca_ray.storage.store import open_store

RETURN_HOURS = 1  # in which a writer may come back to its partial file
PROBES = (".write-probe-", ".swap-probe-")  # the beginnings of their names, directly below a root


def leftovers(root: str, older_than: datetime) -> list[str]:
    """Return the partial files and probes below `root` that were last changed before a time, sorted.

    Object stores have no partial files. Symbolic links are not followed.
    """
    store = open_store(root)
    store.filesystem.invalidate_cache()
    with storage_errors(root, "list"):
        if is_local(store.filesystem):
            files = [
                Path(folder, name)
                for folder, _, names in os.walk(store.path)
                for name in names
                if is_leftover(name)
            ]
            old = [str(path) for path in files if is_older(path, older_than)]
        elif store.filesystem.exists(store.path):
            names = [str(name) for name in store.filesystem.ls(store.path, detail=False)]
            probes = [name for name in names if is_leftover(name.rsplit("/", 1)[-1])]
            old = [name for name in probes if store.filesystem.modified(name) < older_than]
        else:
            old = []
    return sorted(f"{root.rstrip('/')}{path.removeprefix(store.path.rstrip('/'))}" for path in old)


def remove_partials(uri: str) -> None:
    """Remove the partial files of one local file that no writer returns to any more."""
    older_than = no_return()
    store = open_store(uri)
    if not is_local(store.filesystem):
        return
    path = Path(store.path)
    with only_warn(f"removing the leftovers of crashes of {uri}"), storage_errors(uri, "remove"):
        for file in path.parent.iterdir() if path.parent.exists() else ():
            # Its name is the target's and the suffix; another file's name may begin alike.
            is_partial = PARTIAL.sub("", file.name) == path.name != file.name
            if is_partial and is_older(file, older_than):
                file.unlink(missing_ok=True)


def is_older(file: Path, than: datetime) -> bool:
    """Return whether a file was last changed before a time. One that its writer renamed meanwhile was not."""
    try:
        return file.lstat().st_mtime < than.timestamp()
    except FileNotFoundError:
        return False


def is_leftover(name: str) -> bool:
    return bool(PARTIAL.search(name)) or name.startswith(PROBES)


def remove_leftovers(root: str, older_than: datetime | None = None) -> None:
    """Remove the leftovers below `root`, and abort unfinished uploads. A store that fails is a warning.

    By default, these are the leftovers that no writer returns to any more.
    """
    older_than = older_than or no_return()
    with only_warn(f"removing the leftovers of crashes in {root}"):
        delete_files(leftovers(root, older_than))
        with storage_errors(root, "remove"):
            open_store(root).abort_uploads(older_than)


def no_return() -> datetime:
    """Return the time after which every writer that may return has changed its files."""
    return datetime.now(UTC) - timedelta(hours=RETURN_HOURS)
