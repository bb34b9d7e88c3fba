"""What goes wrong with reading, as errors with a remedy: wrong arguments, files that cannot be read."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pyarrow as pa

from rebeca_ray.errors import Failure, InputError, StorageError, describe, did_you_mean
from rebeca_ray.schemas import TABLES
from rebeca_ray.storage.filesystem import exists, join
from rebeca_ray.storage.store import classify, failure_types

if TYPE_CHECKING:
    from rebeca_ray.catalog.read import Snapshot

SURROGATE = re.compile("[\ud800-\udfff]")


def check_columns(snapshot: Snapshot, name: str, columns: Sequence[str] | None) -> list[str] | None:
    """Return the columns as a list. Raises InputError for an unknown table or column."""
    if isinstance(columns, str):
        raise TypeError(f"columns is the string {columns!r}; give a list of columns, [{columns!r}]")
    columns = None if columns is None else list(columns)
    if name not in TABLES:
        raise InputError(f"catalog {snapshot.root}: there is no table {name!r}; {did_you_mean(name, TABLES)}")
    known = snapshot.schema(name).names
    for column in columns or []:
        if column not in known:
            raise InputError(
                f"catalog {snapshot.root}: {name} has no column {column!r}; {did_you_mean(column, known)}"
            )
    return columns


def sorted_users(name: str, user_ids: Sequence[str]) -> list[str]:
    """Return each user once, sorted, without names that are not text.

    Raises TypeError for a single name: Python would take it for a list of letters.
    """
    if isinstance(user_ids, str):
        raise TypeError(f"user_ids is the string {user_ids!r}; give a list of users, [{user_ids!r}]")
    if name == "images":
        raise InputError("images: has no users; read the users' items, and give them to `Snapshot.images`")
    users = user_ids.to_pylist() if isinstance(user_ids, pa.Array | pa.ChunkedArray) else list(user_ids)
    if strange := [user for user in users if not isinstance(user, str)]:
        raise TypeError(
            f"user_ids: {strange[0]!r} is a {type(strange[0]).__name__}; every user_id is a string"
        )
    return sorted({user for user in users if not SURROGATE.search(user)})


@contextmanager
def explained(snapshot: Snapshot, path: str = "") -> Iterator[None]:
    """Raise a UserError with the remedy for whatever keeps a file (or one of them) from being read."""
    try:
        yield
    except (pa.ArrowException, *failure_types()) as error:
        run, file = f"catalog {snapshot.root}: run {snapshot.run_id}", f"{path} " if path else ""
        broken = classify(error) in (Failure.MISSING, Failure.DAMAGED)
        try:
            gone = broken and not exists(join(snapshot.root, snapshot.path, "manifest.json"))
            rewritten = broken and not gone and not exists(join(snapshot.root, snapshot.manifest.files.path))
        except StorageError:
            broken, gone, rewritten = False, False, False
        if not broken:
            raise StorageError(
                f"{run}: {file}cannot be read ({describe(error)}); "
                "check the network and the credentials, and ask again"
            ) from None
        if gone:
            raise InputError(
                f"{run} was collected and cannot be read any more; go on with `refresh()`, "
                "and hold no snapshot longer than the grace period of `rebeca catalog gc`"
            ) from None
        if rewritten:
            raise InputError(
                f"{run} was rewritten, because somebody was erased from it; go on with `refresh()`, "
                "or open it again"
            ) from None
        raise InputError(
            f"{run}: {file}is missing or damaged ({describe(error)}); "
            "`rebeca catalog verify` names every such file: restore it, or `rebeca catalog rollback`, "
            "if an earlier snapshot does without it; or generate into another root"
        ) from None
