"""Garbage collection of exports: those that died, and complete ones beyond the latest.

Each export writes into a folder of its own, `run_id=…/token=…`, and its description last. A loader that
still reads an earlier export can finish.
"""

import re

from rebeca_ray.catalog.lease import Lease
from rebeca_ray.storage.filesystem import delete_files, join, list_files, remove_empty_folders
from rebeca_ray.storage.leftovers import remove_leftovers

FOLDER = re.compile(r"(run_id=[^/]+/token=(\d+))/(.+)")


def remove_old_exports(
    base: str, lease: Lease, previous: str | None, *, description: str, parts: str, keep: int
) -> None:
    """Remove exports below `base` but the `keep` latest complete ones, under the lease of a complete one.

    `previous` is the folder of the export that was published before; it stays too. `description` is the file
    that is written last, `parts` a pattern of the other files. Files with other names stay. Partial files of
    writers that were killed an hour ago go everywhere below the root of the lease.
    """
    root = base.rstrip("/")
    files: dict[tuple[int, str], list[str]] = {}
    for uri in list_files(root):
        if place := FOLDER.fullmatch(uri.removeprefix(f"{root}/")):
            folder, token, name = place.groups()
            files.setdefault((int(token), folder), []).append(name)
    # A lost pointer begins again with token 1: what has a later one stays until then.
    files = {key: names for key, names in files.items() if key[0] <= lease.fencing_token}
    complete = sorted(key for key, names in files.items() if description in names)
    stay = {*complete[-keep:], *(key for key in complete if key[1] == previous)}
    ours = re.compile(rf"({re.escape(description)}|{parts})(\.partial\S*)?")
    old = [key for key in files if key not in stay]
    lease.check()
    # The description goes first: what is left without one is incomplete, and goes next time.
    delete_files([join(root, folder, description) for token, folder in old if (token, folder) in complete])
    for token, folder in old:
        names = files[token, folder]
        delete_files([join(root, folder, name) for name in names if ours.fullmatch(name)])
        remove_empty_folders(join(root, folder))
    remove_leftovers(lease.root)
