"""`latest.json`, the one mutable object of a catalog: the published snapshot, and the writer's lease.

A folder with versions (versions.py) has such a pointer too, in a file of another name.

read_pointer -> change -> swap, a compare-and-swap of the store. Repeated while other writers come between.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter
from typing_extensions import TypedDict

from rebeca_ray.catalog.layout import InnerPath
from rebeca_ray.errors import InputError, LeaseHeldError, UserError
from rebeca_ray.storage.filesystem import join, storage_errors, unreadable
from rebeca_ray.storage.objects import encode_json
from rebeca_ray.storage.store import failure_types, open_store

POINTER = "latest.json"
Kind = Literal["catalog", "prior", "items"]
POINTERS_OF: dict[Kind, str] = {"catalog": POINTER, "prior": "prior.json", "items": "items.json"}
REMEMBERED = 100  # snapshots published before, or withdrawn
TRIES = 20  # swaps, while other writers come between


class LeaseState(TypedDict):
    """The lease of the one writer: see lease.py."""

    run_id: str
    fencing_token: int
    holder: str
    beat: int
    seconds: Annotated[float, Field(gt=0, le=86_400)]  # a waiting run takes it on trust


class Replaced(TypedDict):
    """A snapshot that was published before, and the time of its replacement (ISO 8601, UTC)."""

    run_id: str
    replaced_at: str


class Withdrawn(TypedDict):
    """A snapshot that somebody rolled back. No night makes its date again."""

    run_id: str
    run_date: str


@dataclass(frozen=True, kw_only=True)
class Pointer:
    """The published snapshot, the highest fencing token so far, and the writer's lease.

    Before the first publication, the snapshot is None. Garbage collection names the runs that it is about to
    remove in `doomed`, in one swap with the check of its lease: nobody can publish or resume them any more.
    """

    catalog_id: str | None = None  # of an older version, until the next lease
    fencing_token: int = 0
    run_id: str | None = None
    run_date: str | None = None
    snapshot: InnerPath | None = None  # its folder, below the root
    forced: bool = False  # published although the quality gate refused it
    lease: LeaseState | None = None
    previously_published: tuple[Replaced, ...] = ()  # the latest at the end; gc needs them
    withdrawn: tuple[Withdrawn, ...] = ()
    doomed: tuple[str, ...] = ()  # run ids
    rewritten: int = 0  # the token of the last erasure that rewrote the published snapshot


POINTERS = TypeAdapter(Pointer)


def read_pointer(root: str, kind: Kind = "catalog") -> tuple[Pointer, str | None]:
    """Return the pointer and its version, for a swap; an empty pointer and None before the first.

    Raises InputError if the pointer is damaged or may not be read, StorageError if its store does not answer.
    """
    store = open_store(join(root, POINTERS_OF[kind]))
    try:
        versioned = store.read_versioned()
    except failure_types() as error:
        raise unreadable(f"{kind} {root}", error) from None
    if versioned is None:
        return Pointer(), None
    data, version = versioned
    try:
        values = json.dumps(renamed_from_version_3(json.loads(data)))
        return POINTERS.validate_json(values, strict=True), version
    except (ValueError, RecursionError):  # pydantic's ValidationError is a ValueError
        raise damaged(root, kind) from None


def renamed_from_version_3(values: Any) -> Any:
    """Return a pointer that version 3 wrote under the key names of version 4; any other as it is."""
    if isinstance(values, list):
        return [renamed_from_version_3(value) for value in values]
    if not isinstance(values, dict):
        return values
    names = {"epoch": "fencing_token", "left": "previously_published", "at": "replaced_at"}
    return {names.get(name, name): renamed_from_version_3(value) for name, value in values.items()}


def damaged(root: str, kind: Kind = "catalog") -> UserError:
    remedy = "publish one of the snapshots that `rebeca catalog list` shows"
    if kind != "catalog":
        remedy = "write a new version: `rebeca embed`, `rebeca train` or `rebeca distill`"
    return InputError(f"{kind} {root}: {POINTERS_OF[kind]} is damaged; remove it, and {remedy}")


def change_pointer(root: str, change: Callable[[Pointer], Pointer], kind: Kind = "catalog") -> Pointer:
    """Replace the pointer by `change` of it, and return the new one. Repeats if another writer was faster.

    Passes on any error of `change`. Raises LeaseHeldError if other writers are faster TRIES times.
    """
    for _ in range(TRIES):
        current, version = read_pointer(root, kind)
        changed = change(current)
        if changed == current or swap(root, changed, version, kind):
            return changed
        # The answer to a stored write may be lost. The client then writes again and is refused, because
        # its own write changed the version. So compare the content before the next try.
        if read_pointer(root, kind)[0] == changed:
            return changed
    raise LeaseHeldError(
        f"{kind} {root}: {POINTERS_OF[kind]} was changed by others {TRIES} times in a row; "
        "look who writes there"
    )


def moved(pointer: Pointer, *, run_id: str, run_date: str, snapshot: str, forced: bool) -> Pointer:
    """Return the pointer with another snapshot published.

    Raises InputError for one that garbage collection is removing.
    """
    if run_id in pointer.doomed:
        raise InputError(f"run {run_id}: its snapshot is being collected; publish another")
    before = pointer.previously_published
    if pointer.run_id is not None and pointer.run_id != run_id:
        now = datetime.now(UTC).isoformat(timespec="seconds")  # for gc alone
        before = (*before, Replaced(run_id=pointer.run_id, replaced_at=now))[-REMEMBERED:]
    return replace(
        pointer,
        run_id=run_id,
        run_date=run_date,
        snapshot=snapshot,
        forced=forced,
        previously_published=before,
        withdrawn=tuple(entry for entry in pointer.withdrawn if entry["run_id"] != run_id),
    )


def swap(root: str, pointer: Pointer, version: str | None, kind: Kind = "catalog") -> bool:
    """Write `pointer` if the stored one still has `version`. Return whether it did."""
    uri = join(root, POINTERS_OF[kind])
    store = open_store(uri)
    with storage_errors(uri):
        return store.compare_and_swap(encode_json(asdict(pointer)), version)
