"""The folders and files of a catalog, and the identity of one run.

    <root>/latest.json                              the published snapshot, the lease, and the catalog's id
    <root>/runs/<id>.json                           the catalog's id and a run: written before its folders
    <root>/snapshots/run_date=<date>/run_id=<id>/
        manifest.json                               written last
        files-<token>.parquet                       one row per file
        {items,users,errors,changes}/bucket=<b>/part-<token>.parquet
    <root>/images/run_id=<id>/bucket=<b>/part-<token>-*.parquet
                                                    immutable; later snapshots may use them too
    <root>/rated/<clip>-<D>/part-*.parquet          embeddings of rated generated items; kept for ever
    <root>/erasures/tombstones.json                 keyed hashes of erased users
    <root>/erasures/receipts/<number>.json          what each erasure removed; kept for ever
    <root>/reports/<time>-<job>-<id>.json           the summary of an ended attempt
    <root>/work/run_id=<id>/
        run.json                                    the inputs of the run; written first
        decisions/, plan/, plan.json                decisions; planned items; the plan is complete
        records/shard=<s>/                          one record per image file, written after it
        shards/<s>.json                             the shard is rendered, with its records

A reader follows `latest.json` -> `manifest.json` -> its file list -> files, and never lists a prefix.
`<token>` is the fencing token of the attempt that wrote the file.
"""

import os
import secrets
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated

from pydantic import AfterValidator

from rebeca_ray.config.fields import absolute
from rebeca_ray.errors import InputError
from rebeca_ray.storage.filesystem import join

POPULATION_USER = ""  # owns the pool that all cold-start users share; no request can name it


@dataclass(frozen=True, kw_only=True)
class Run:
    """One attempt at one snapshot. A later attempt at the same run has a higher fencing token."""

    root: str
    run_date: str
    run_id: str
    fencing_token: int

    @property
    def snapshot(self) -> str:
        """The snapshot's folder, below the root."""
        return snapshot_folder(self.run_date, self.run_id)

    @property
    def manifest(self) -> str:
        return join(self.root, self.snapshot, "manifest.json")

    @property
    def work(self) -> str:
        return work_folder(self.root, self.run_id)

    @property
    def plan(self) -> str:
        return join(self.work, "plan")

    @property
    def plan_marker(self) -> str:
        """Present once the plan is complete."""
        return join(self.work, "plan.json")

    def decisions(self, bucket: int, kind: str = "all") -> str:
        """The decisions on `all` users of a bucket, or on those `to-plan`."""
        return join(self.work, "decisions", kind, f"bucket-{bucket:05d}.parquet")

    def records(self, shard: int) -> str:
        return join(self.work, "records", f"shard={shard}")

    def shard_marker(self, shard: int) -> str:
        """Present once the shard is rendered."""
        return join(self.work, "shards", f"{shard}.json")

    @property
    def images(self) -> str:
        """The run's image files, below the root."""
        return image_folder(self.run_id)

    def table(self, name: str, bucket: int) -> str:
        """The part file of a table of the snapshot, below the root."""
        return f"{self.snapshot}/{name}/bucket={bucket}/part-{self.fencing_token:06d}.parquet"


def inside(path: str) -> str:
    """Return a path that a record names below its root. Raises ValueError for one that leads elsewhere.

    Nobody but us should write such records, but what they name is read, and later removed.
    """
    if any(part in ("", ".", "..") for part in path.split("/")):
        raise ValueError(f"{path!r} is no path below the root")
    return path


InnerPath = Annotated[str, AfterValidator(inside)]


def snapshot_folder(run_date: str, run_id: str) -> str:
    return f"snapshots/run_date={run_date}/run_id={run_id}"


def work_folder(root: str, run_id: str) -> str:
    return join(root, f"work/run_id={run_id}")


def image_folder(run_id: str) -> str:
    """Return the folder of a run's image files, below the root."""
    return f"images/run_id={run_id}"


def outside(root: str, out: str, name: str) -> str:
    """Return the folder of an export.

    Raises InputError for an empty name, a file, or a folder inside the catalog.
    """
    if not out.strip():
        raise InputError(f"{name}: is empty; give a folder, or s3://bucket/prefix")
    folder, catalog = (f"{absolute(uri).rstrip('/')}/" for uri in (out, root))
    if folder.startswith(catalog):
        raise InputError(
            f"{name} {out}: is in the catalog {root}, whose files are nobody else's; choose another folder"
        )
    if os.path.isfile(folder.rstrip("/")):
        raise InputError(f"{name} {out}: is a file; give a folder")
    return folder.rstrip("/")


def new_run_id() -> str:
    return f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{secrets.token_hex(3)}"
