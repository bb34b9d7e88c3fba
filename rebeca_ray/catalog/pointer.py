"""`latest.json`, the one mutable object of a catalog: what is published, and who may write. Changed by compare-and-swap alone."""

import fcntl
import json
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict

from rebeca_ray.errors import InputError, LeaseHeldError, UserError, describe
from rebeca_ray.storage.filesystem import UNREACHABLE, is_local, join, open_filesystem, storage_errors
from rebeca_ray.storage.objects import write_json

POINTER = "latest.json"
LOCK_SECONDS = 30  # which a change takes milliseconds of
REMEMBERED = 100  # snapshots that were published before
TRIES = 20  # of changing it while others do


class LeaseState(TypedDict):
    """Who may write: see lease.py."""

    run_id: str
    epoch: int
    holder: str
    beat: int
    seconds: float


class Left(TypedDict):
    """A snapshot that was published, and when another took its place (ISO 8601, UTC)."""

    run_id: str
    at: str


@dataclass(frozen=True, kw_only=True)
class Pointer:
    """The published snapshot (None before the first), the highest epoch handed out, and the lease of a run at work."""

    epoch: int = 0
    run_id: str | None = None
    run_date: str | None = None
    snapshot: str | None = None  # its folder, below the root
    forced: bool = False  # published though the quality gate refused it
    lease: LeaseState | None = None
    left: tuple[Left, ...] = ()  # published before, the last of them last; gc goes by it


def read_pointer(root: str) -> tuple[Pointer, str | None]:
    """The pointer and its version, to be given to a swap; an empty one and None before the first.

    Raises UserError if it cannot be read or is damaged.
    """
    filesystem, path = open_filesystem(join(root, POINTER))
    try:
        if is_local(filesystem):
            version = text = Path(path).read_text()
        else:
            filesystem.invalidate_cache(path)
            version = filesystem.info(path, refresh=True)["ETag"]
            text = filesystem.cat_file(path).decode()
    except FileNotFoundError:
        return Pointer(), None
    except UnicodeDecodeError:
        raise damaged(root) from None
    except UNREACHABLE as error:
        raise InputError(
            f"catalog {root}: cannot be read ({describe(error)}); check the path and the credentials"
        ) from None
    try:
        return TypeAdapter(Pointer).validate_json(text, strict=True), version
    except ValidationError:
        raise damaged(root) from None


def damaged(root: str) -> UserError:
    return InputError(
        f"catalog {root}: {POINTER} is damaged; remove it, and publish one of the snapshots that `rebeca catalog list` shows"
    )


def change_pointer(root: str, change: Callable[[Pointer], Pointer]) -> Pointer:
    """Swap the pointer for what `change` makes of it, as often as another writer comes between; returns the new one.

    On S3 by `If-Match` / `If-None-Match`, locally under a file lock and by a rename. What `change` raises is raised. An answer that
    was lost (stored, asked again, 412) is no lost race: what is there is then what was to be written.
    """
    filesystem, path = open_filesystem(join(root, POINTER))
    for _ in range(TRIES):
        with locked(Path(path)) if is_local(filesystem) else nullcontext():
            current, version = read_pointer(root)
            wanted = change(current)
            if wanted == current or swap(root, wanted, version):
                return wanted
        if read_pointer(root)[0] == wanted:
            return wanted
    raise LeaseHeldError(
        f"catalog {root}: {POINTER} was changed by others {TRIES} times in a row; look who writes there"
    )


def left_behind(pointer: Pointer, run_id: str) -> tuple[Left, ...]:
    """What will have been published before, once `run_id` is. The time is told for gc alone."""
    if pointer.run_id is None or pointer.run_id == run_id:
        return pointer.left
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return (*pointer.left, Left(run_id=pointer.run_id, at=now))[-REMEMBERED:]


def locked(path: Path) -> Any:
    """The lock file beside the pointer, open and held until it is closed."""
    with storage_errors(str(path), "written"):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.with_name(".latest.lock").open("w")
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return lock
        except BlockingIOError:
            if time.monotonic() > deadline:
                lock.close()
                raise InputError(
                    f"{lock.name}: another process has held it for {LOCK_SECONDS} s; end that process"
                ) from None
            time.sleep(0.02)


def swap(root: str, wanted: Pointer, version: str | None) -> bool:
    """Write `wanted` if `version` is still there; False if it is not."""
    uri = join(root, POINTER)
    filesystem, path = open_filesystem(uri)
    if is_local(filesystem):
        write_json(asdict(wanted), uri)
        return True
    condition = {"IfMatch": version} if version else {"IfNoneMatch": "*"}
    with storage_errors(uri, "written"):
        try:
            filesystem.pipe_file(path, json.dumps(asdict(wanted), indent=2).encode(), **condition)
        except OSError as error:
            answer = getattr(error.__cause__, "response", {})
            status, code = (
                answer.get("ResponseMetadata", {}).get("HTTPStatusCode"),
                answer.get("Error", {}).get("Code"),
            )
            if status in (409, 412) or code == "NoSuchKey":  # changed, being changed, or removed
                return False
            raise
    return True
