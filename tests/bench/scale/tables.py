"""The driver's part of a night, and whole snapshots of tables, at sizes that no night of ours reaches.

Image files have rows without pixels. Ten items per user count for the lists of files, one for the tables.
"""

import os
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from rebeca_ray import schemas
from rebeca_ray.catalog.counts import OUTCOMES
from rebeca_ray.catalog.figures import figures_of
from rebeca_ray.catalog.file_list import write_file_list
from rebeca_ray.catalog.layout import Run
from rebeca_ray.catalog.manifest import Counts, FileList, FileRow
from rebeca_ray.generation.assemble import check_counts, image_rows, inputs_of
from rebeca_ray.generation.assembly import BucketResult
from rebeca_ray.generation.decide import KEYS_PER_BUCKET, cut
from rebeca_ray.generation.decisions import Decisions, DecisionsFile
from rebeca_ray.generation.parts import PartRecord
from rebeca_ray.generation.plan import ITEMS_PER_FILE
from rebeca_ray.generation.render import Rendered
from rebeca_ray.generation.request import split_request
from rebeca_ray.identity import hash128
from rebeca_ray.storage.objects import write_json
from rebeca_ray.storage.parquet import WrittenTable, write_table
from rebeca_ray.storage.records import write_record
from tests.bench.scale.night import (
    IMAGES_PER_FILE,
    STAGES,
    USERS_PER_BUCKET,
    D,
    Night,
    check,
    collect_garbage,
    export,
    user_ids,
    verify_stage,
    write_inputs,
)
from tests.conftest import publish, synthetic_manifest

ITEMS_LISTED = 10  # per user, in the lists of files
NOTHING: WrittenTable = {"rows": 0, "bytes": 0, "sha256": "0" * 64}


def split(night: Night) -> Callable[[], object]:
    night.context  # noqa: B018
    return lambda: split_request(night.context)


def order(night: Night) -> Callable[[], object]:
    """Cut the keys that the buckets return into shards."""
    random = np.random.default_rng(0)
    share = USERS_PER_BUCKET * ITEMS_LISTED / KEYS_PER_BUCKET
    size = (KEYS_PER_BUCKET, 1)
    ones = np.ones(size)
    parts = [
        np.concatenate([random.random(size), random.random(size), random.random(size), share * ones], axis=1)
        for _ in range(night.num_buckets)
    ]

    def work() -> None:
        shards = len(cut(np.concatenate(parts), 2_000_000)) + 1
        assert abs(shards - night.users * ITEMS_LISTED / 2_000_000) <= 1, shards

    return work


def lists(night: Night) -> Callable[[], object]:
    """Read the plan, give the buckets their inputs, count their results, and write the list of files."""
    context, buckets = night.context, night.num_buckets
    items = USERS_PER_BUCKET * ITEMS_LISTED
    parts = [
        record("plan", bucket, 0) for bucket in range(buckets) for _ in range(1 + items // ITEMS_PER_FILE)
    ]
    write_record({"decisions": "", "parts": [asdict(part) for part in parts]}, night.run.plan_marker)
    images = [
        record(night.run.images, bucket, number)
        for bucket in range(buckets)
        for number in range(items // IMAGES_PER_FILE)
    ]
    decided = [
        DecisionsFile(bucket=bucket, to_plan=False, path="all", **NOTHING) for bucket in range(buckets)
    ]
    decisions = Decisions(
        pool=None, by_urgency=False, boundaries=[], planned_users=0, planned_items=0, shards=1, files=decided
    )
    counts = {**dict.fromkeys([*OUTCOMES, "users", "stale_users"], 0), "requested": USERS_PER_BUCKET}
    counts[schemas.NEW] = counts["users"] = USERS_PER_BUCKET
    results = [
        BucketResult(
            files=[row(night.run, name, bucket) for name in ("items", "users", "errors", "changes")],
            images=[],
            counts=counts,
            sums={"items": 1.0, "duplicates": 0.0},
            live_rows={},
        )
        for bucket in range(buckets)
    ]

    def work() -> None:
        inputs = inputs_of(context, decisions, Rendered(files=images, timed_out=False))
        check_counts(context, results)
        figures_of(night.users, 0, 0, [result.sums for result in results])
        rows = image_rows(context, [file for bucket in inputs for file in bucket.files], results)
        rows += [row for result in results for row in result.files]
        rows = sorted(rows, key=lambda row: (row["table"], row["bucket"], row["file"]))
        run = night.run
        assert write_file_list(run.root, run.snapshot, run.fencing_token, rows).rows == len(rows)

    return work


def record(folder: str, bucket: int, number: int) -> PartRecord:
    name = hash128(folder, bucket, number)[:16]
    path = f"{folder}/bucket={bucket}/part-000001-{name}.parquet"
    return PartRecord(
        bucket=bucket, shard=0, attempt=0, path=path, **NOTHING, failed=0, busy_seconds=0.0
    )  # fmt: skip


def row(run: Run, name: str, bucket: int, **values: object) -> FileRow:
    """Return a row of the list of files."""
    users = {"min_user_id": "a", "max_user_id": "z", "live_rows": None}
    path = run.table(name, bucket)
    return {"table": name, "bucket": bucket, "file": bucket, "path": path, **NOTHING, **users, **values}  # type: ignore[typeddict-item]


def write_snapshots(folder: Path, users: int) -> None:
    """Write two snapshots of the same tables, and publish them one after the other. Files are linked."""
    night = Night(folder, users)
    root = str(folder / "catalog")
    old, new = (
        Run(root=root, run_date="2026-01-01", run_id=name, fencing_token=1) for name in ("old", "scale")
    )
    rows = [row for bucket in range(night.num_buckets) for row in write_bucket(new, bucket)]
    for run in (old, new):
        listing = [{**values, "path": values["path"].replace(new.snapshot, run.snapshot)} for values in rows]
        for before, after in zip(rows, listing, strict=True):
            if before["path"] != after["path"]:
                (folder / "catalog" / after["path"]).parent.mkdir(parents=True, exist_ok=True)
                os.link(folder / "catalog" / before["path"], folder / "catalog" / after["path"])
        path = f"{run.snapshot}/files-000001.parquet"
        table = pa.Table.from_pylist(listing, schema=schemas.FILES)
        written = write_table(table, f"{root}/{path}", row_group_size=10_000)
        counts = dict.fromkeys(Counts.model_fields, 0) | {"requested": users, "new": users, "users": users}
        manifest = synthetic_manifest(
            run,
            FileList(path=path, **written),
            counts=Counts(**counts),
            embed_dim=D,
            num_buckets=night.num_buckets,
            created_at=datetime.now(UTC).isoformat(),
        )
        write_json(manifest.model_dump(), run.manifest)
        publish(root, run)


def write_bucket(run: Run, bucket: int) -> list[FileRow]:
    """Write the tables of one bucket, and its images without pixels."""
    count = USERS_PER_BUCKET
    users = user_ids(bucket * count, (bucket + 1) * count)
    ids = pa.array([f"{number:032x}" for number in range(bucket * count, (bucket + 1) * count)])
    random = np.random.default_rng(bucket)
    embeds = random.standard_normal(count * D, np.float32).astype(np.float16).astype(np.float32)
    columns: dict[str, dict[str, Any]] = {
        "items": {
            "item_id": ids,
            "user_id": users,
            "rank": np.zeros(count),
            "image_embeds": pa.FixedSizeListArray.from_arrays(pa.array(embeds), type=schemas.image_embeds(D)),
            "safety_flag": np.zeros(count, bool),
            "origin": pa.repeat("new", count),
            "generated_at": pa.repeat(pa.scalar(datetime.now(UTC)), count),
            "image_file": np.full(count, bucket),
            "image_row": np.arange(count),
        },
        "users": {
            "user_id": users,
            **{name: np.ones(count) for name in ("num_images", "num_items")},
            **{name: np.zeros(count) for name in ("num_failed", "generation")},
            **{name: np.zeros(count, bool) for name in ("cold_start", "stale")},
            **{name: pa.repeat(name, count) for name in ("history_digest", "prior", "settings_digest")},
            "planned_on": pa.repeat(pa.scalar(date(2026, 1, 1)), count),
            "planned_by": pa.repeat("scale", count),
        },
        "images": {"item_id": ids, **{name: np.full(count, 16) for name in ("width", "height", "seed")}},
    }
    rows = []
    for name, values in columns.items():
        schema = schemas.table(name, D)
        arrays = [column(values.get(field.name), count).cast(field.type) for field in schema]
        path = (
            f"{run.images}/bucket={bucket}/part-000001-0.parquet"
            if name == "images"
            else run.table(name, bucket)
        )
        embed_column = "image_embeds" if name == "items" else None
        uri = f"{run.root}/{path}"
        written = write_table(
            pa.table(arrays, schema=schema), uri, row_group_size=2000, embed_column=embed_column
        )
        ends = {"min_user_id": users[0].as_py(), "max_user_id": users[-1].as_py(), "live_rows": None}
        if name == "images":
            ends = {"min_user_id": None, "max_user_id": None, "live_rows": count}
        rows.append(row(run, name, bucket, path=path, **written, **ends))
    return rows


def column(values: Any, count: int) -> pa.Array:
    if values is None:
        return pa.nulls(count)
    return values if isinstance(values, pa.Array) else pa.array(values)


STAGES_OF = {
    "night": STAGES,
    "driver": {"check": check, "split": split, "order": order, "lists": lists},
    "tables": {"verify": verify_stage, "export": export, "gc": collect_garbage},
}
INPUTS_OF = {"night": write_inputs, "driver": write_inputs, "tables": write_snapshots}
