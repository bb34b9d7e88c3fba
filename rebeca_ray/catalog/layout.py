"""Where everything of a catalog lies, and the identity of one run.

    <root>/images/run_id=<id>/bucket=<b>/part-<epoch>-*.parquet            immutable; may serve later snapshots too
    <root>/snapshots/run_date=<date>/run_id=<id>/{items,errors,changes}/bucket=<b>/part-*.parquet
    <root>/snapshots/run_date=<date>/run_id=<id>/files.parquet             one row a file
    <root>/snapshots/run_date=<date>/run_id=<id>/manifest.json             written last
    <root>/work/run_id=<id>/…                                              plan and checksums, private to the run
    <root>/latest.json                                                     the published snapshot

A reader follows `latest.json` -> `manifest.json` -> `files.parquet` -> files, and never lists a prefix.
"""

import secrets
from dataclasses import dataclass
from datetime import UTC, datetime

from rebeca_ray.catalog.publish import read_pointer
from rebeca_ray.config import GenerateConfig
from rebeca_ray.storage import join

BUCKET = 0  # catalogs so far have one


@dataclass(frozen=True, kw_only=True)
class Run:
    """One attempt at one snapshot: who it is, and where it writes."""

    root: str
    run_date: str
    run_id: str
    epoch: int

    @classmethod
    def start(cls, config: GenerateConfig) -> "Run":
        """A run for today (UTC) under a fresh id, unless the config names them; its epoch follows the published one."""
        pointer, _ = read_pointer(config.root)
        now = datetime.now(UTC)
        return cls(
            root=config.root.rstrip("/"),
            run_date=(config.run_date or now.date()).isoformat(),
            run_id=config.run_id or f"{now:%Y%m%dT%H%M%S}-{secrets.token_hex(3)}",
            epoch=pointer["epoch"] + 1 if pointer else 1,
        )

    @property
    def snapshot(self) -> str:
        """The snapshot's folder, below the root."""
        return f"snapshots/run_date={self.run_date}/run_id={self.run_id}"

    @property
    def work(self) -> str:
        return join(self.root, f"work/run_id={self.run_id}")

    @property
    def plan(self) -> str:
        return join(self.work, "plan")

    @property
    def checksums(self) -> str:
        return join(self.work, "checksums")

    @property
    def images(self) -> str:
        """The run's image files, below the root."""
        return f"images/run_id={self.run_id}/bucket={BUCKET}"

    def table(self, name: str) -> str:
        """The part file of a table of the snapshot, below the root."""
        return f"{self.snapshot}/{name}/bucket={BUCKET}/part-{self.epoch:06d}-000000.parquet"
