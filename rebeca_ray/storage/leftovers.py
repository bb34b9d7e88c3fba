"""Leftovers of crashes: partial files, probes and unfinished uploads that no process will complete."""

from datetime import datetime
from pathlib import Path

from rebeca_ray.storage.failures import only_warn
from rebeca_ray.storage.filesystem import delete_files, is_local, storage_errors
from rebeca_ray.storage.local import PARTIAL
from rebeca_ray.storage.store import open_store

PROBES = (".write-probe-", ".swap-probe-")  # the beginnings of their names, directly below a root


def leftovers(root: str, older_than: datetime) -> list[str]:
    """Return the partial files and probes below `root` that were last changed before a time, sorted.

    Object stores have no partial files. Symbolic links are not followed.
    """
    store = open_store(root)
    store.filesystem.invalidate_cache()
    with storage_errors(root, "list"):
        if is_local(store.filesystem):
            files = [path for path in Path(store.path).rglob("*") if is_leftover(path.name)]
            old = [str(path) for path in files if path.lstat().st_mtime < older_than.timestamp()]
        elif store.filesystem.exists(store.path):
            names = [str(name) for name in store.filesystem.ls(store.path, detail=False)]
            probes = [name for name in names if is_leftover(name.rsplit("/", 1)[-1])]
            old = [name for name in probes if store.filesystem.modified(name) < older_than]
        else:
            old = []
    return sorted(f"{root.rstrip('/')}{path.removeprefix(store.path.rstrip('/'))}" for path in old)


def is_leftover(name: str) -> bool:
    return bool(PARTIAL.search(name)) or name.startswith(PROBES)


def remove_leftovers(root: str, older_than: datetime) -> None:
    """Remove the leftovers below `root`, and abort unfinished uploads. A store that fails is a warning."""
    with only_warn(f"removing the leftovers of crashes in {root}"):
        delete_files(leftovers(root, older_than))
        with storage_errors(root, "remove"):
            open_store(root).abort_uploads(older_than)
