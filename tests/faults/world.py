"""The world of one command: inputs that stay, and a catalog with its exports at one root.

inputs -> nights and exports -> prepared states, once -> `Lab.fresh` copies one to the root, for each fault
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import date, timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pyarrow as pa
import pyarrow.parquet as pq

from rebeca_ray import nightly
from rebeca_ray.catalog import lease
from rebeca_ray.catalog.exports import image_objects, key_values
from rebeca_ray.catalog.exports.iceberg import register_snapshot
from rebeca_ray.catalog.exports.image_objects import export_images
from rebeca_ray.catalog.exports.key_values import export_key_values
from rebeca_ray.catalog.read import read_catalog
from rebeca_ray.config.decoder import DecoderSettings
from rebeca_ray.config.jobs import GenerateConfig
from rebeca_ray.config.sections import LayoutSettings, LimitSettings
from rebeca_ray.decoder.interface import DecodedImage, Rows
from rebeca_ray.generation import render
from rebeca_ray.generation.pipeline import generate_catalog
from rebeca_ray.generation.repair.suspects import REASON
from rebeca_ray.ray_runtime import for_each_bucket
from tests.conftest import NO_GATE, USERS, generate_config
from tests.faults.disk import FailingDisk, Killed, watched
from tests.generation.light_render import PlainDecoder
from tests.generation.test_nights import change_digest

MONDAY = date(2026, 3, 2)
NIGHTS = 4
URL_BASE = "https://cdn.example.com"
BLOCK = 4  # images per file
GIVEN_UP_AT = 90  # an operation in the middle of rendering


@dataclass(frozen=True)
class World:
    """A catalog and its exports below a root, made from inputs elsewhere."""

    root: str
    inputs: GenerateConfig
    stall_minutes: float | None = None

    @property
    def catalog(self) -> str:
        return f"{self.root}/catalog"

    def out(self, name: str) -> str:
        """Return the folder of an export."""
        return f"{self.root}/{name}"

    def night(self, number: int) -> GenerateConfig:
        """Return the config of a night. The last nights have a prior that knows more of some users."""
        folder = Path(self.inputs.request).parent
        return self.inputs.model_copy(
            update={
                "catalog": self.catalog,
                "request": str(folder / f"request-{number}.parquet"),
                "prior": self.inputs.prior if number < 2 else f"{self.inputs.prior}-later",
                "run_date": MONDAY + timedelta(days=number),
                "gate": NO_GATE,
                "error_budget": 0.2,  # for a row that kills
                "layout": LayoutSettings(num_buckets=2, items_per_shard=8, images_per_file=BLOCK),
                "limits": LimitSettings(stall_minutes=self.stall_minutes),
            }
        )


def write_inputs(folder: Path, decoder: DecoderSettings) -> GenerateConfig:
    """Write priors, items and the requests of all nights."""
    inputs = generate_config(folder, decoder)
    inputs = inputs.model_copy(update={"decoder": decoder.model_copy(update={"batch_size": 2})})
    shutil.copytree(inputs.prior, f"{inputs.prior}-later")
    later = inputs.model_copy(update={"prior": f"{inputs.prior}-later"})
    for user in USERS[3:6]:
        change_digest(later, user)
    for number in range(NIGHTS):
        users = ["stranger", *USERS[number : number + 5]]
        counts = pa.array([3] * (len(users) - 1) + [5], pa.int32())
        request = pa.table({"user_id": users, "num_images": counts})
        pq.write_table(request, folder / f"request-{number}.parquet")
    return inputs


class Clock:
    """A clock that nobody waits for: sleeping moves it."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class Drawn:
    """The decoder's work: rows that were drawn, the seeds to refuse, and a disturbance before each batch."""

    def __init__(self) -> None:
        self.rows = 0
        self.seeds: list[int] = []
        self.refused: frozenset[int] = frozenset()

    def disturb(self, seeds: list[int]) -> None:
        """Do nothing. A fault replaces it."""


class CountingDecoder(PlainDecoder):
    """Counts its rows, and draws all but the refused ones."""

    def __init__(self, drawn: Drawn) -> None:
        self.drawn = drawn

    def decode(self, rows: Rows) -> list[DecodedImage]:
        self.drawn.disturb(rows.seeds)
        images = super().decode(rows)
        self.drawn.rows += len(images)
        self.drawn.seeds += rows.seeds
        return [
            DecodedImage(seed=image.seed, error=REASON) if image.seed in self.drawn.refused else image
            for image in images
        ]


@contextmanager
def in_this_process(drawn: Drawn) -> Iterator[None]:
    """Run all stages here, with a decoder of plain images, and wait for no lease in real time."""
    clock = Clock()
    with (
        patch.object(render, "build_decoder", lambda _: CountingDecoder(drawn)),
        patch.object(nightly, "generate_catalog", partial(generate_catalog, in_process=True)),
        patch.object(image_objects, "for_each_bucket", partial(for_each_bucket, in_process=True)),
        patch.object(key_values, "for_each_bucket", partial(for_each_bucket, in_process=True)),
        patch.object(lease, "time", SimpleNamespace(monotonic=clock.monotonic, sleep=clock.sleep)),
    ):
        yield


class Lab:
    """Prepared states of a world, and a root to which one of them is copied for each trial."""

    def __init__(self, folder: Path, decoder: DecoderSettings) -> None:
        self.folder = folder
        self.drawn = Drawn()
        (folder / "inputs").mkdir(parents=True)
        self.world = World(root=str(folder / "world"), inputs=write_inputs(folder / "inputs", decoder))
        with in_this_process(self.drawn):
            self.make_states()

    def make_states(self) -> None:
        """Keep: nothing; two nights with their exports; three nights; three, and a run that was given up."""
        world = self.world
        Path(world.root).mkdir()
        self.keep("nothing")
        for number in range(2):
            generate_catalog(world.night(number), in_process=True)
            export_all(world)
        self.keep("two nights")
        generate_catalog(world.night(2), in_process=True)
        self.keep("three nights")
        disk = FailingDisk("killed before", GIVEN_UP_AT, lambda: None)
        with suppress(Killed), watched(world.root, disk):
            generate_catalog(world.night(3), in_process=True)
        assert disk.happened
        self.keep("a run given up")

    def keep(self, state: str) -> None:
        shutil.copytree(self.world.root, self.folder / "states" / state)

    def fresh(self, state: str) -> World:
        """Return the world in a state. It always has the same root, because Iceberg keeps absolute paths."""
        shutil.rmtree(self.world.root, ignore_errors=True)
        shutil.copytree(self.folder / "states" / state, self.world.root)
        return replace(self.world)


def export_all(world: World) -> None:
    """Export the published snapshot in every form that keeps something from one export to the next."""
    snapshot = read_catalog(world.catalog)
    export_images(snapshot, world.out("images"), URL_BASE)
    export_key_values(snapshot, world.out("values"), "jsonl")
    register_snapshot(snapshot, f"sqlite:///{world.out('iceberg.db')}", world.out("warehouse"))
