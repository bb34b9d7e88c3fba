"""Embed the images of items with open_clip, in a Ray Data stage, and publish the embeddings as a version.

items (images) -> `EmbedImages` -> `WriteEmbeds` -> files of a new version of the embedded items

No process holds more embeddings than those of one file. The driver holds the ids of all items.
"""

import datetime
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rebeca_ray import schemas
from rebeca_ray.catalog.versions import VERSIONS, replace_version, versions_in
from rebeca_ray.config.jobs import EmbedConfig
from rebeca_ray.data.bad_images import (
    read_bad_images,
    refuse_bad_images,
    warn_of_bad_images,
    write_bad_images,
)
from rebeca_ray.data.clip import ERROR, EmbedImages, clip_fingerprint
from rebeca_ray.data.items import MARKER, files_of, open_items, read_item_ids, version_of
from rebeca_ray.data.streaming import stream
from rebeca_ray.data.validation import check_columns
from rebeca_ray.errors import InputError
from rebeca_ray.identity import hash128
from rebeca_ray.ray_runtime import ExcludeIds, behind_actors, require_room, start_ray, whole_blocks, with_log
from rebeca_ray.storage.filesystem import join
from rebeca_ray.storage.objects import read_json, write_json
from rebeca_ray.storage.parquet import ParquetInput, open_parquet, write_table
from rebeca_ray.storage.writable import require_own, require_writable
from rebeca_ray.telemetry import metrics
from rebeca_ray.telemetry.calls import recorded
from rebeca_ray.watchdog import Activity, watchdog

ROWS_PER_FILE = 20_000
BATCHES_PER_BLOCK = 4  # at most: Ray takes milliseconds to hand a block to an actor
BLOCKS_PER_ACTOR = 8  # at least, so that all actors end at about the same time
WRITTEN = pa.schema(
    [
        ("file", pa.string()),  # null for a batch of bad images alone
        ("rows", pa.int64()),
        ("bad_images", pa.list_(pa.struct([("item_id", pa.string()), ("reason", pa.string())]))),
    ]
)


@dataclass(frozen=True, kw_only=True)
class Kept:
    """What a version takes over from the previous one: embedded items, their files, and bad images."""

    item_id: np.ndarray = field(default_factory=lambda: np.array([], object))
    files: list[str] = field(default_factory=list)
    bad_images: dict[str, str] = field(default_factory=dict)

    @cached_property
    def all_ids(self) -> pa.Array:
        return pa.array([*self.item_id, *self.bad_images], pa.string())


@metrics.running(metrics.Command.EMBED)
def embed_items(config: EmbedConfig, *, only_new: bool = False, run_date: datetime.date | None = None) -> int:
    """Embed every item of `config.items`, and publish the embeddings as a new version of `config.out`.

    Returns how many items were embedded. `only_new` keeps the embeddings in `config.out` and adds items whose
    `item_id` is new. If another CLIP made the existing ones, all items are embedded again. The pointer
    records `run_date`, by default today in UTC. Raises LeaseHeldError if another process writes `config.out`,
    and InputError, naming them, for images that cannot be read, unless `config.bad_images` drops them.
    """
    source = open_parquet(config.items, "items")
    columns = check_columns(source, schemas.ITEMS, instead={"image_embeds": "nothing is left to embed"})
    item_id = read_item_ids(source)
    if f"{config.items}/".startswith(f"{config.out.rstrip('/')}/"):
        raise InputError(
            f"out {config.out}: holds the items themselves and would be replaced; choose another folder"
        )
    if not versions_in(config.out):  # a lost pointer does not make them somebody else's
        require_own(config.out, "out", {"items.json": "fencing_token", MARKER: "clip"})
    fingerprint = clip_fingerprint(config.clip, config.background)
    require_writable(config.out, "out")
    activity = Activity(partial(metrics.note_progress, metrics.Command.EMBED))
    with (
        replace_version(config.out, "items", "embed") as version,
        watchdog(activity, config.stall_minutes, on_stall=version.lease.release),
    ):
        before = files_of(version.previous)
        kept = kept_of(config, version.previous, fingerprint, item_id) if only_new else Kept()
        if kept.files and pc.all(pc.is_in(pa.array(item_id), value_set=kept.all_ids)).as_py():
            warn_of_bad_images(config.items, kept.bad_images, len(item_id), version.previous)
            return 0
        activity.enter("embed")
        folder = version.begin(fingerprint)
        written = embed_images(config, source, columns, kept, folder, activity)
        source.require_unchanged("it was embedded")
        embedded = sum(written["rows"].to_pylist())
        bad_images = dict(kept.bad_images)
        for file in written["bad_images"].to_pylist():
            bad_images |= {image["item_id"]: image["reason"] for image in file}
        if config.bad_images == "refuse" or not (embedded or len(kept.item_id)):
            refuse_bad_images(config.items, bad_images, len(item_id))
        warn_of_bad_images(config.items, bad_images, len(item_id), folder)
        write_bad_images(bad_images, folder)
        new_files = (f"{VERSIONS}/{version.name}/{file}" for file in written["file"].drop_null().to_pylist())
        files = [*kept.files, *sorted(new_files)]
        meta = {
            "clip": fingerprint,
            "clip_name": config.clip,
            "rows": embedded + len(kept.item_id),
            "bad_images": len(bad_images),
            "files": files,
        }
        write_json(meta, join(folder, MARKER))
        version.publish(
            run_date or datetime.datetime.now(datetime.UTC).date(),
            uses={version_of(file) for file in [*files, *before]},
        )
    return embedded


def kept_of(config: EmbedConfig, previous: str, fingerprint: str, item_id: np.ndarray) -> Kept:
    """Return what stays of the previous version. Embeddings of different CLIPs cannot be compared."""
    if (read_json(join(previous, MARKER)) or {}).get("clip") != fingerprint:
        return Kept()
    known_ids = set(item_id.tolist())
    bad_images = read_bad_images(previous) if config.bad_images == "drop" else {}
    return Kept(
        item_id=read_item_ids(open_items(previous)),
        files=files_of(previous),
        bad_images={item: reason for item, reason in bad_images.items() if item in known_ids},
    )


def embed_images(
    config: EmbedConfig, source: ParquetInput, columns: pa.Schema, kept: Kept, folder: str, activity: Activity
) -> pa.Table:
    """Write the embeddings of all items that are not kept; return a row of WRITTEN for each file."""
    start_ray()
    require_room(
        "num_actors",
        workers=config.num_actors,
        cpus=config.cpus_per_actor,
        device=config.device,
        spare_cpus=1,
    )
    import ray

    items = stream(source, columns, config.batch_size)
    if len(kept.all_ids):
        items = items.map_batches(ExcludeIds(kept.all_ids), batch_format="pyarrow", batch_size=None)
    total = max(0, source.num_rows - len(kept.all_ids))  # kept items may be gone from the source
    batches = total // (config.num_actors * BLOCKS_PER_ACTOR * config.batch_size)
    rows_per_block = config.batch_size * min(max(1, batches), BATCHES_PER_BLOCK)
    blocks = items.repartition(target_num_rows_per_block=rows_per_block)
    embedded = blocks.map_batches(
        with_log(recorded(EmbedImages, metrics.Stage.EMBED)),
        fn_constructor_args=(config.clip, config.device, config.background, activity.listen()),
        batch_size=config.batch_size,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=config.num_actors),
        num_cpus=config.cpus_per_actor,
        num_gpus=1 if config.device == "cuda" else 0,
    )
    per_file = whole_blocks(ROWS_PER_FILE, rows_per_block)
    written = behind_actors(
        embedded, WriteEmbeds(folder), per_file, actors=config.num_actors, cpus=config.cpus_per_actor
    )
    with activity.counting("embed", total) as counted:
        files = list(counted_files(written.iter_batches(batch_size=None, batch_format="pyarrow"), activity))
        counted.reach(total)  # the last rows of a worker had no beat
    return pa.concat_tables([WRITTEN.empty_table(), *files])


def counted_files(batches: Iterator[pa.Table], activity: Activity) -> Iterator[pa.Table]:
    """Yield rows of WRITTEN, and record the rows of their files."""
    for batch in batches:
        activity.move()
        bad_images = sum(len(images) for images in batch["bad_images"].to_pylist())
        metrics.ROWS.record(sum(batch["rows"].to_pylist()) + bad_images, metrics.Stage.EMBED)
        metrics.FAILED_ROWS.record(bad_images, metrics.Stage.EMBED)
        yield batch


@dataclass(frozen=True)
class WriteEmbeds:
    """Rows of EmbedImages in; one file of those without an error, and a row of WRITTEN out.

    The ids decide the name of a file: a task that Ray retries writes over its own file.
    """

    folder: str

    def __call__(self, batch: pa.Table) -> pa.Table:
        is_bad = pc.is_valid(batch[ERROR])
        bad = batch.filter(is_bad).select(["item_id", ERROR]).rename_columns(["item_id", "reason"])
        rows = batch.filter(pc.invert(is_bad)).drop_columns([ERROR])
        file = None
        if rows.num_rows:
            file = f"{hash128(*rows['item_id'].to_pylist())[:16]}.parquet"
            path = join(self.folder, file)
            write_table(rows, path, row_group_size=ROWS_PER_FILE, embed_column="image_embeds")
        row = {"file": file, "rows": rows.num_rows, "bad_images": bad.to_pylist()}
        return pa.Table.from_pylist([row], schema=WRITTEN)
