"""The commands of the campaign: each begins in a state of the world, and leaves something to see."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq

from rebeca_ray.catalog.exports.atlas import export_atlas
from rebeca_ray.catalog.exports.iceberg import open_iceberg, register_snapshot
from rebeca_ray.catalog.exports.image_objects import export_images, read_export
from rebeca_ray.catalog.exports.key_values import DESCRIPTION, Format, export_key_values
from rebeca_ray.catalog.gc import collect
from rebeca_ray.catalog.pointer import read_pointer
from rebeca_ray.catalog.read import read_catalog
from rebeca_ray.catalog.snapshots import list_snapshots, publish_snapshot, roll_back
from rebeca_ray.config.jobs import NightlyConfig
from rebeca_ray.generation.pipeline import generate_catalog
from rebeca_ray.nightly import run_nightly
from rebeca_ray.schemas import TABLES
from rebeca_ray.storage.filesystem import join, open_filesystem
from rebeca_ray.storage.parquet import read_table
from rebeca_ray.storage.writable import require_new_parquet
from tests.faults.reader import NOTHING, View, published_digest
from tests.faults.world import URL_BASE, World


@dataclass(frozen=True)
class Command:
    """A command, the state it begins in, and the views that it changes besides the catalog."""

    name: str
    state: str
    run: Callable[[World], object]
    views: tuple[View, ...] = ()
    draws: bool = False
    once: bool = False  # nobody repeats it without a look at its result
    local: bool = False  # runs on a disk alone


def generate(world: World, number: int) -> None:
    generate_catalog(world.night(number), in_process=True)


def nightly(world: World) -> None:
    config = world.night(2)
    settings = {"run_date": config.run_date, "catch_up": 0, "keep_snapshots": 1, "grace_hours": 0}
    run_nightly(NightlyConfig.model_validate({"generate": config.model_dump(), **settings}))


def images(world: World) -> None:
    export_images(read_catalog(world.catalog), world.out("images"), URL_BASE)


def values(world: World, format: Format) -> None:
    snapshot = read_catalog(world.catalog)
    since = snapshot.manifest.previous_run_id if format == "redis" else None
    export_key_values(snapshot, world.out("values"), format, since=since)


def atlas(world: World) -> None:
    require_new_parquet(world.out("atlas.parquet"))
    export_atlas(read_catalog(world.catalog), world.out("atlas.parquet"), 20)


def database(world: World) -> str:
    return f"sqlite:///{world.out('iceberg.db')}"


def iceberg(world: World) -> None:
    register_snapshot(read_catalog(world.catalog), database(world), world.out("warehouse"))


def publish_oldest(world: World) -> None:
    publish_snapshot(world.catalog, list_snapshots(world.catalog)[0].run_id)


# Views. Each is a stamp, which is cheap and changes with the content, and a hash of all content.


def catalog_stamp(world: World) -> str | None:
    return read_pointer(world.catalog)[0].snapshot


def catalog_digest(world: World) -> str:
    return published_digest(world.catalog)


def images_stamp(world: World) -> str | None:
    return read_pointer(world.out("images"))[0].snapshot


def images_digest(world: World) -> str:
    """Return one hash of all URLs and of the objects behind them."""
    out, digest = world.out("images"), hashlib.sha256()
    export = read_export(out)
    if export is None:
        return NOTHING
    for file in export.files:
        for row in read_table(join(out, file), "export").to_pylist():
            filesystem, path = open_filesystem(join(out, row["image_key"]))
            digest.update(repr(sorted(row.items())).encode() + filesystem.cat_file(path))
    return digest.hexdigest()


def values_stamp(format: Format) -> Callable[[World], str | None]:
    return lambda world: read_pointer(join(world.out("values"), format))[0].snapshot


def values_digest(format: Format) -> Callable[[World], str]:
    def digest_of(world: World) -> str:
        """Return one hash of the part files of the latest export."""
        base, digest = join(world.out("values"), format), hashlib.sha256()
        folder = read_pointer(base)[0].snapshot
        if folder is None:
            return NOTHING
        filesystem, path = open_filesystem(join(base, folder))
        description = json.loads(filesystem.cat_file(f"{path}/{DESCRIPTION}"))
        for part in description["files"]:
            digest.update(filesystem.cat_file(f"{path}/{part['path']}"))
        return digest.hexdigest()

    return digest_of


def atlas_stamp(world: World) -> str | None:
    file = Path(world.out("atlas.parquet"))
    return str(file.stat().st_ino) if file.exists() else None


def atlas_digest(world: World) -> str:
    if atlas_stamp(world) is None:
        return NOTHING
    return hashlib.sha256(repr(pq.read_table(world.out("atlas.parquet")).to_pylist()).encode()).hexdigest()


def iceberg_stamp(world: World) -> str | None:
    return None  # five tables, one commit each: only the end of a command is looked at


def iceberg_digest(world: World) -> str:
    """Return one hash of the files that each table lists."""
    tables = {}
    warehouse = open_iceberg(database(world), world.out("warehouse"))
    for name in TABLES:
        table = warehouse.load_table(f"rebeca.{name}")
        tables[name] = sorted(task.file.file_path for task in table.scan().plan_files())
    return hashlib.sha256(json.dumps(tables).encode()).hexdigest()


CATALOG = View("catalog", catalog_stamp, catalog_digest)
IMAGES = View("images", images_stamp, images_digest)
JSONL, REDIS = (View(format, values_stamp(format), values_digest(format)) for format in ("jsonl", "redis"))
ATLAS = View("atlas", atlas_stamp, atlas_digest)
ICEBERG = View("iceberg", iceberg_stamp, iceberg_digest)

COMMANDS = (
    Command("first night", "nothing", lambda world: generate(world, 0), draws=True),
    Command("night", "two nights", lambda world: generate(world, 2), draws=True),
    Command("nightly", "two nights", nightly, draws=True),
    Command("gc", "a run given up", lambda world: collect(world.catalog, keep=1, grace_hours=0)),
    Command("publish", "three nights", publish_oldest),
    Command("rollback", "three nights", lambda world: roll_back(world.catalog), once=True),
    Command("export images", "three nights", images, (IMAGES,)),
    Command("export values", "three nights", lambda world: values(world, "jsonl"), (JSONL,)),
    Command("export changes", "three nights", lambda world: values(world, "redis"), (REDIS,)),
    Command("export atlas", "three nights", atlas, (ATLAS,), once=True, local=True),
    Command("export iceberg", "three nights", iceberg, (ICEBERG,), local=True),
)
