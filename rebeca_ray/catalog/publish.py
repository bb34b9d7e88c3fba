"""The one pointer: `latest.json` is moved to a complete snapshot by a compare-and-swap, or not at all."""

import fcntl
import json
from pathlib import Path
from typing import Any

from botocore.exceptions import ClientError

from rebeca_ray.errors import UserError
from rebeca_ray.storage import UNREACHABLE, describe, is_local, join, open_filesystem, read_json, write_json

POINTER = "latest.json"


class LostRaceError(UserError):
    """Another run published since this one started."""

    exit_code = 5


def read_pointer(root: str) -> tuple[dict[str, Any] | None, str | None]:
    """The published `latest.json` and its version (an ETag on S3, None locally); (None, None) before the first."""
    filesystem, path = open_filesystem(join(root, POINTER))
    if is_local(filesystem):
        return read_checked(root), None
    filesystem.invalidate_cache()
    try:
        version = filesystem.info(path)["ETag"]
    except FileNotFoundError:
        return None, None
    except UNREACHABLE as error:
        raise UserError(f"catalog {root}: cannot be read ({describe(error)}); check the path and the credentials") from None
    return read_checked(root), version


def read_checked(root: str) -> dict[str, Any] | None:
    pointer = read_json(join(root, POINTER))
    if pointer and not (
        isinstance(pointer.get("epoch"), int) and all(isinstance(pointer.get(name), str) for name in ("run_id", "snapshot"))
    ):
        raise UserError(f"catalog {root}: {POINTER} names no run_id, snapshot and epoch; restore it from a backup or remove it")
    return pointer


def publish(root: str, snapshot: str, *, run_id: str, run_date: str, epoch: int) -> None:
    """Point `latest.json` at `snapshot` if nobody published since the run of `epoch` started.

    On S3 by `If-Match` / `If-None-Match`, locally under a file lock. Raises LostRaceError otherwise.
    """
    pointer = {"run_id": run_id, "run_date": run_date, "snapshot": snapshot, "epoch": epoch}
    filesystem, path = open_filesystem(join(root, POINTER))
    if is_local(filesystem):
        with Path(path).with_name(".latest.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            refuse_stale(root, read_pointer(root)[0], epoch)
            write_json(pointer, join(root, POINTER))
        return
    current, version = read_pointer(root)
    refuse_stale(root, current, epoch)
    condition = {"IfMatch": version} if version else {"IfNoneMatch": "*"}
    try:
        filesystem.pipe_file(path, json.dumps(pointer, indent=2).encode(), **condition)
    except (ClientError, OSError) as error:
        if "PreconditionFailed" in str(error) or "412" in str(error) or "pre-conditions" in str(error):
            found = read_pointer(root)[0]
            if found == pointer:  # stored, but the answer was lost and the client asked again
                return
            refuse_stale(root, found, epoch)
        raise


def refuse_stale(root: str, current: dict[str, Any] | None, epoch: int) -> None:
    if current and current["epoch"] >= epoch:
        raise LostRaceError(
            f"catalog {root}: run {current['run_id']} published epoch {current['epoch']} while this run (epoch {epoch}) was at work; "
            "this snapshot stays unpublished, run again"
        )
