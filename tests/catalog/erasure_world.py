"""A catalog with exports to erase people from, and everything of a person in it."""

import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from rebeca_ray import schemas
from rebeca_ray.catalog.erasure.tombstones import KEY
from rebeca_ray.catalog.read import Snapshot, open_snapshot, read_catalog
from rebeca_ray.catalog.snapshots import list_snapshots
from rebeca_ray.config.decoder import DecoderSettings
from rebeca_ray.forget import Erased, Iceberg, Places, forget
from rebeca_ray.generation.pipeline import generate_catalog
from rebeca_ray.storage.filesystem import list_files, open_filesystem
from rebeca_ray.storage.parquet import write_table
from tests.conftest import D
from tests.faults.disk import FailingDisk, Killed, watched
from tests.faults.world import Drawn, World, export_all, in_this_process, write_inputs

ANN, BEN, STRANGER = "user-2", "user-3", "stranger"
SECRET = "a secret of sixteen characters or more"


@dataclass(frozen=True)
class Person:
    """Everything of a person that must not stay: id, items and images."""

    user_id: str
    item_ids: set[str]
    images: set[bytes]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_decoder: DecoderSettings) -> World:
    """Make two nights with their exports, a rated item of two users, and a run that was killed."""
    folder = tmp_path_factory.mktemp("forget")
    (folder / "inputs").mkdir()
    world = World(root=str(folder / "world"), inputs=write_inputs(folder / "inputs", tiny_decoder))
    Path(world.root).mkdir()
    with in_this_process(Drawn()):
        for number in range(2):
            generate_catalog(world.night(number), in_process=True)
            export_all(world)
        rated = read_catalog(world.catalog).items(["item_id", "image_embeds"], [ANN, BEN])
        rated = rated.cast(schemas.embedded_items(D))
        write_table(rated, f"{world.catalog}/rated/clip-{D}/part-0.parquet", row_group_size=10)
        with suppress(Killed), watched(world.root, FailingDisk("killed before", 90)):
            generate_catalog(world.night(2), in_process=True)
    assert list(Path(world.catalog, "work").iterdir())
    shutil.copytree(world.root, folder / "kept")
    return world


@pytest.fixture
def world(made: World, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    monkeypatch.setenv(KEY, SECRET)
    with in_this_process(Drawn()):
        yield restored(made)


def restored(world: World) -> World:
    """Return the world as it was made, at the same root: Iceberg keeps absolute paths."""
    shutil.rmtree(world.root, ignore_errors=True)
    shutil.copytree(Path(world.root).parent / "kept", world.root)
    return world


def places_of(world: World) -> Places:
    tables = Iceberg(f"sqlite:///{world.out('iceberg.db')}", world.out("warehouse"))
    return Places(folders=[world.out("images"), world.out("values")], iceberg=tables)


def erase(world: World, *users: str, dry_run: bool = False) -> Erased:
    return forget(world.catalog, users or [ANN], places_of(world), dry_run=dry_run)


def person_of(world: World, user: str) -> Person:
    """Collect what all snapshots hold of a person whose items nobody shares."""
    item_ids, images = set[str](), set[bytes]()
    for manifest in list_snapshots(world.catalog):
        snapshot = open_snapshot(world.catalog, manifest.path)
        items = snapshot.items(user_ids=[user])
        item_ids.update(items["item_id"].to_pylist())
        images.update(snapshot.images(items))
    assert len(item_ids) == len(images) > 0
    return Person(user, item_ids, images)


def traces_of(person: Person, root: str) -> list[str]:
    """Return the files below a root whose name, bytes or decompressed tables hold anything of a person."""
    needles = [person.user_id.encode(), *(item.encode() for item in person.item_ids), *person.images]
    hits = []
    for uri in list_files(root):
        filesystem, path = open_filesystem(uri)
        data = uri.removeprefix(root).encode() + filesystem.cat_file(path)
        if ".parquet" in uri and data.endswith(b"PAR1"):
            file = pq.ParquetFile(BytesIO(filesystem.cat_file(path)))
            data += repr(file.metadata.to_dict()).encode() + repr(file.read().to_pylist()).encode()
            data += b"".join(image["bytes"] for image in images_in(file.read()))
        if any(needle in data for needle in needles):
            hits.append(uri.removeprefix(root))
    return hits


def images_in(table: pa.Table) -> list[dict[str, bytes]]:
    return table["image"].drop_null().to_pylist() if "image" in table.column_names else []


def others(snapshot: Snapshot) -> list[dict[str, object]]:
    """Return items and images of everybody but ANN, without the locations."""
    items = snapshot.items()
    items = items.filter(pc.not_equal(items["user_id"], ANN))
    images = snapshot.images(items)
    rows = items.drop_columns(["image_file", "image_row"]).to_pylist()
    return [{**row, "image": image} for row, image in zip(rows, images, strict=True)]


def snapshots_of(world: World) -> list[Snapshot]:
    return [open_snapshot(world.catalog, manifest.path) for manifest in list_snapshots(world.catalog)]
