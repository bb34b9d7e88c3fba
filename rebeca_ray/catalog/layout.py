"""Where everything of a catalog lies, and the identity of one run.

    <root>/latest.json                                                     what is published, and who may write
    <root>/snapshots/run_date=<date>/run_id=<id>/manifest.json             written last
    <root>/snapshots/run_date=<date>/run_id=<id>/files-<epoch>.parquet     one row a file
    <root>/snapshots/run_date=<date>/run_id=<id>/{items,users,errors,changes}/bucket=<b>/part-<epoch>.parquet
    <root>/images/run_id=<id>/bucket=<b>/part-<epoch>-*.parquet            immutable; may serve later snapshots too
    <root>/rated/<clip>-<D>/part-*.parquet                                 embeddings of generated items that were rated; stay for ever
    <root>/work/run_id=<id>/run.json                                       what the run is made from; written first
    <root>/work/run_id=<id>/decisions/, plan/, plan.json                   who is drawn; what; that the plan is whole
    <root>/work/run_id=<id>/records/unit=<u>/                              one record an image file, written after it
    <root>/work/run_id=<id>/units/<u>.json                                 that a unit is rendered, with its records

A reader follows `latest.json` -> `manifest.json` -> its file list -> files, and never lists a prefix.
"""

import os
import secrets
from dataclasses import dataclass
from datetime import UTC, datetime

from rebeca_ray.config.fields import absolute
from rebeca_ray.errors import InputError
from rebeca_ray.storage.filesystem import join

POPULATION_USER = ""  # the user whose items all strangers share; no request can name it


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run for one snapshot: who it is, and where it writes. `epoch` is the attempt's."""

    root: str
    run_date: str
    run_id: str
    epoch: int

    @property
    def snapshot(self) -> str:
        """The snapshot's folder, below the root."""
        return f"snapshots/run_date={self.run_date}/run_id={self.run_id}"

    @property
    def manifest(self) -> str:
        return join(self.root, self.snapshot, "manifest.json")

    @property
    def work(self) -> str:
        return work_folder(self.root, self.run_id)

    @property
    def plan(self) -> str:
        return join(self.work, "plan")

    def decisions(self, bucket: int, kind: str = "all") -> str:
        """Of `all` users of a bucket, or of those `to-plan`."""
        return join(self.work, "decisions", kind, f"bucket-{bucket:05d}.parquet")

    def records(self, unit: int) -> str:
        return join(self.work, "records", f"unit={unit}")

    def unit(self, unit: int) -> str:
        return join(self.work, "units", f"{unit}.json")

    @property
    def images(self) -> str:
        """The run's image files, below the root."""
        return f"images/run_id={self.run_id}"

    def table(self, name: str, bucket: int) -> str:
        """The part file of a table of the snapshot, below the root."""
        return f"{self.snapshot}/{name}/bucket={bucket}/part-{self.epoch:06d}.parquet"


def work_folder(root: str, run_id: str) -> str:
    return join(root, f"work/run_id={run_id}")


def outside(root: str, out: str, name: str) -> str:
    """Where an export goes. Raises UserError for no place, a file, or a place in the catalog."""
    if not out.strip():
        raise InputError(f"{name}: is empty; give a folder, or s3://bucket/prefix")
    place, within = (f"{absolute(uri).rstrip('/')}/" for uri in (out, root))
    if place.startswith(within):
        raise InputError(
            f"{name} {out}: is in the catalog {root}, whose files are nobody else's; choose another folder"
        )
    if os.path.isfile(place.rstrip("/")):
        raise InputError(f"{name} {out}: is a file; give a folder")
    return place.rstrip("/")


def new_run_id() -> str:
    return f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{secrets.token_hex(3)}"
