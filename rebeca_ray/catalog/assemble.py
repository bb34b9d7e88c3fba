"""Assembling: plan and images of a run become the public tables of one snapshot, with every item accounted for."""

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rebeca_ray import schemas
from rebeca_ray.catalog.layout import BUCKET, Run
from rebeca_ray.catalog.read import Snapshot, published
from rebeca_ray.errors import ErrorBudgetExceededError, QualityGateError, UserError
from rebeca_ray.storage import join, open_filesystem, read_json, read_table, write_json, write_table

ITEM_ROW_GROUP = 2000


class IncompleteRunError(UserError):
    """Planned items have neither an image nor a reason; rerunning makes them."""

    exit_code = 75


@dataclass(frozen=True, kw_only=True)
class ImageFiles:
    """The run's image files: where each item's image is, or why it failed; one with neither was not fit to be shown."""

    files: list[dict[str, Any]]  # rows of schemas.FILES
    item_id: pa.Array
    file: np.ndarray
    row: np.ndarray
    error: pa.Array
    width: pa.Array
    safety_probability: pa.Array


def assemble(
    run: Run,
    *,
    requested: int,
    error_budget: float,
    max_safety_probability: float,
    versions: dict[str, str],
    quality: dict[str, Any],
    decoder_weights: dict[str, str],
) -> dict[str, Any]:
    """Write the snapshot's tables, its file list and, last, its manifest; returns the manifest. Publishes nothing.

    Raises IncompleteRunError if an item is unaccounted for, ErrorBudgetExceededError if too many failed.
    """
    plan = read_table(run.plan, "plan").sort_by([("user_id", "ascending"), ("rank", "ascending")])
    images = read_image_files(run)
    place = pc.index_in(plan["item_id"].combine_chunks(), value_set=images.item_id)
    if plan.num_rows != requested or place.null_count:
        raise IncompleteRunError(
            f"run {run.run_id}: {requested} items requested, {plan.num_rows} planned, "
            f"{plan.num_rows - place.null_count} rendered; nothing is published, start another run"
        )
    error = images.error.take(place)
    failed = pc.is_valid(error)
    num_failed = pc.sum(failed).as_py() or 0
    if num_failed > error_budget * requested:
        reasons = ", ".join(str(reason) for reason in pc.unique(error.filter(failed))[:3].to_pylist())
        raise ErrorBudgetExceededError(
            f"run {run.run_id}: {num_failed} of {requested} items failed ({reasons}), "
            f"the budget is {error_budget:.2%}; nothing is published"
        )
    rendered = pc.is_valid(images.width.take(place))
    if not pc.any(rendered).as_py():
        raise QualityGateError(
            f"run {run.run_id}: not one of {requested} items has an image fit to be shown; look at decoder.safety. Nothing is published"
        )
    items = items_table(plan.filter(rendered), place.filter(rendered).to_numpy(), images, max_safety_probability)
    errors = pa.table(
        {
            "item_id": plan["item_id"].filter(failed),
            "user_id": plan["user_id"].filter(failed),
            "stage": pa.array(["render"] * num_failed, pa.string()),
            "error": error.filter(failed),
            "attempt": pa.array([0] * num_failed, pa.int32()),
        },
        schema=schemas.ERRORS,
    )
    files = [*images.files]
    for name, table, embed_column in (
        ("items", items, "image_embeds"),
        ("errors", errors, None),
        ("changes", changes_table(items, published(run.root)), None),
    ):
        table = table.replace_schema_metadata(file_metadata(versions))
        written = write_table(table, join(run.root, run.table(name)), row_group_size=ITEM_ROW_GROUP, embed_column=embed_column)
        ends = pc.min_max(table["user_id"]).as_py()
        files.append(
            {
                "table": name,
                "bucket": BUCKET,
                "file": 0,
                "path": run.table(name),
                "min_user_id": ends["min"],
                "max_user_id": ends["max"],
                **written,
            }
        )
    population = pc.sum(pc.equal(items["origin"], "population")).as_py() or 0
    listing = f"{run.snapshot}/files.parquet"
    list_written = write_table(pa.Table.from_pylist(files, schema=schemas.FILES), join(run.root, listing), row_group_size=10_000)
    manifest = {
        "schema_version": schemas.SCHEMA_VERSION,
        "run_id": run.run_id,
        "run_date": run.run_date,
        "epoch": run.epoch,
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "counts": {
            "requested": requested,
            "new": items.num_rows - population,
            "carried": 0,
            "population": population,
            "failed": num_failed,
            "filtered": requested - items.num_rows - num_failed,
            "users": pc.count_distinct(items["user_id"]).as_py(),
        },
        "quality": quality,
        "versions": versions,
        "decoder_weights": decoder_weights,
        "embed_dim": items.schema.field("image_embeds").type.list_size,
        "files": {"path": listing, **list_written},
    }
    counts = manifest["counts"]
    assert counts["requested"] == sum(counts[kind] for kind in ("new", "carried", "population", "failed", "filtered"))
    write_json(manifest, join(run.root, run.snapshot, "manifest.json"))
    return manifest


def read_image_files(run: Run) -> ImageFiles:
    """List the run's finished image files (those with a checksum record) and index their items, repeats dropped."""
    filesystem, folder = open_filesystem(join(run.root, run.images))
    found = sorted(str(path) for path in filesystem.find(folder) if str(path).endswith(".parquet"))
    files: list[dict[str, Any]] = []
    tables, file_of, row_of = [], [], []
    for path in found:
        name = path.rsplit("/", 1)[-1]
        record = read_json(join(run.checksums, f"{name}.json"))
        if record is None:  # left by a write that did not finish
            continue
        with filesystem.open(path, "rb") as file:
            table = pq.read_table(file, columns=["item_id", "error", "width", "safety_probability"])
        row = {"table": "images", "bucket": BUCKET, "file": len(files), "path": f"{run.images}/{name}", "rows": table.num_rows, **record}
        tables.append(table)
        file_of.append(np.full(table.num_rows, len(files), np.int32))
        row_of.append(np.arange(table.num_rows, dtype=np.int32))
        files.append(row)
    if not files:
        raise IncompleteRunError(f"run {run.run_id}: no finished image file in {run.images}; nothing is published, start another run")
    # index_in() finds the first of repeated ids, so a row written twice counts once.
    columns = {name: column.combine_chunks() for name, column in zip(tables[0].column_names, pa.concat_tables(tables), strict=True)}
    return ImageFiles(files=files, file=np.concatenate(file_of), row=np.concatenate(row_of), **columns)


def items_table(plan: pa.Table, place: np.ndarray, images: ImageFiles, max_safety_probability: float) -> pa.Table:
    """The public items: planned rows that have an image, ranks without gaps, sorted by user and rank."""
    count = plan.num_rows
    schema = schemas.items(plan.schema.field("image_embeds").type.list_size)
    users = plan["user_id"].to_numpy(zero_copy_only=False)
    first = np.flatnonzero(np.concatenate([[True], users[1:] != users[:-1]])) if count else np.array([], int)
    rank = np.arange(count) - np.repeat(first, np.diff([*first, count]))
    columns: dict[str, Any] = {
        "rank": pa.array(rank, pa.int16()),
        "safety_flag": pc.fill_null(
            pc.invert(pc.less_equal(images.safety_probability.take(pa.array(place)), max_safety_probability)), False
        ),
        "generated_at": pa.repeat(pa.scalar(datetime.now(UTC), pa.timestamp("us", tz="UTC")), count),
        "image_file": pa.array(images.file[place], pa.int32()),
        "image_row": pa.array(images.row[place], pa.int32()),
    }
    return pa.table([columns.get(name, plan[name] if name in plan.column_names else None) for name in schema.names], schema=schema)


def changes_table(items: pa.Table, previous: Snapshot | None) -> pa.Table:
    """Items added and removed since the published snapshot."""
    now = items.select(["item_id", "user_id"])
    before = previous.items(["item_id", "user_id"]) if previous else now.slice(0, 0)
    added = now.filter(pc.invert(pc.is_in(now["item_id"], value_set=before["item_id"].combine_chunks())))
    removed = before.filter(pc.invert(pc.is_in(before["item_id"], value_set=now["item_id"].combine_chunks())))
    parts = [part.append_column("change", pa.repeat(change, part.num_rows)) for part, change in ((added, "added"), (removed, "removed"))]
    return pa.concat_tables([part.cast(schemas.CHANGES) for part in parts]).sort_by([("user_id", "ascending"), ("item_id", "ascending")])


def file_metadata(versions: dict[str, str]) -> dict[str, str]:
    """Items, errors and changes say what made them; for images the manifest does."""
    return {"rebeca.schema_version": str(schemas.SCHEMA_VERSION), **{f"rebeca.{name}": value for name, value in versions.items()}}
