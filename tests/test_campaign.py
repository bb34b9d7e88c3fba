"""A small seeded campaign: a command dies, or its storage fails, at any moment, and the command is repeated.

A twin catalog gets the same commands without faults. Both must always show the same items, and in the end
nothing else may be left.
"""

import errno
import itertools
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, date, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from s3fs import S3FileSystem

from rebeca_ray import nightly
from rebeca_ray.catalog.exports.image_objects import export_images
from rebeca_ray.catalog.exports.key_values import export_key_values
from rebeca_ray.catalog.gc import collect
from rebeca_ray.catalog.pointer import change_pointer, read_pointer
from rebeca_ray.catalog.read import open_snapshot, read_catalog
from rebeca_ray.catalog.snapshots import list_snapshots, publish_snapshot, roll_back
from rebeca_ray.catalog.verify import verify
from rebeca_ray.config.jobs import GenerateConfig, NightlyConfig
from rebeca_ray.config.sections import InteractionSettings
from rebeca_ray.data import feedback
from rebeca_ray.data.feedback import find_rated
from rebeca_ray.data.interactions import read_interactions
from rebeca_ray.errors import UserError
from rebeca_ray.generation.pipeline import generate_catalog
from rebeca_ray.nightly import run_nightly
from rebeca_ray.ray_runtime import for_each_bucket
from rebeca_ray.storage.filesystem import list_files
from rebeca_ray.storage.leftovers import remove_leftovers
from tests.conftest import NO_GATE, USERS, D
from tests.data.test_feedback import rate
from tests.faulty_s3 import Fault, FaultyS3, forever
from tests.generation.test_nights import change_digest, request_for

SEEDS, LENGTH = 6, 7
S3_SEEDS, S3_LENGTH = 2, 6
COMMANDS = ("generate", "generate", "night", "rate", "collect", "roll back", "publish", "values", "images")
FAILURES = ("killed before", "killed after", "input/output error", "disk full")
OUTAGES: tuple[Fault, ...] = ("slow down", "error", "lost", "cut", "gone")
NO_RATINGS = InteractionSettings(path="none")
CHANGES = ("replace", "unlink", "rmdir")  # of `os`: every change that others can see


class Killed(BaseException):
    """Ends a command as a kill does: nothing of it runs any more."""


class Disk:
    """The changes below a folder. One of them fails; after a kill, all others do too."""

    def __init__(self, root: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = root
        self.left: int | None = None  # changes until the failure; None: no failure
        self.failure = ""
        self.dead = False
        for name in CHANGES:
            monkeypatch.setattr(os, name, self.watched(getattr(os, name)))

    def watched(self, change: Callable[..., None]) -> Callable[..., None]:
        def watch(path: Any, *arguments: Any, **options: Any) -> None:
            if not (str(path).startswith(self.root) or options.get("dir_fd") is not None):
                return change(path, *arguments, **options)
            if self.dead:
                raise Killed
            if self.left is None or self.left > 0:
                self.left = None if self.left is None else self.left - 1
                return change(path, *arguments, **options)
            self.left = None
            if self.failure == "killed after":
                change(path, *arguments, **options)
            if self.failure.startswith("killed"):
                self.dead = True
                raise Killed
            number = errno.EIO if self.failure == "input/output error" else errno.ENOSPC
            raise OSError(number, os.strerror(number), str(path))

        return watch

    def fail(self, generator: random.Random, command: str) -> str:
        """Plan a failure during a command; return its name."""
        self.failure = generator.choice(FAILURES)
        self.left, self.dead = generator.randrange(60 if command in ("generate", "night") else 12), False
        return self.failure

    def mend(self) -> bool:
        """End all failures. Return whether one happened."""
        happened, self.left, self.dead = self.left is None, None, False
        return happened


class Outage:
    """An S3 server behind a proxy. It goes down at some request, and comes back when it is mended."""

    def __init__(self, proxy: FaultyS3) -> None:
        self.proxy = proxy

    def fail(self, generator: random.Random, command: str) -> str:
        """Plan an outage during a command; return its name."""
        fault = generator.choice(OUTAGES)
        after = generator.randrange(150 if command in ("generate", "night") else 20)
        self.proxy.misbehave(itertools.chain([""] * after, forever(fault)))
        return fault

    def mend(self) -> bool:
        """End the outage. Return whether it met a request."""
        happened = any(request.fault for request in self.proxy.requests)
        self.proxy.misbehave([])
        return happened


def shown(root: str) -> dict[str, list[tuple[int, str]]]:
    """Return rank and id of every user's items, as a reader sees them."""
    users: dict[str, list[tuple[int, str]]] = {}
    for row in read_catalog(root).items(["user_id", "rank", "item_id"]).to_pylist():
        users.setdefault(row["user_id"], []).append((row["rank"], row["item_id"]))
    return users


def commands_of(seed: int, length: int) -> Iterator[str]:
    generator = random.Random(seed)
    yield "generate"
    for _ in range(length):
        yield generator.choice(COMMANDS)


def run(command: str, config: GenerateConfig, ratings: InteractionSettings) -> None:
    root = config.catalog
    if command == "generate":
        generate_catalog(config, in_process=True)
    elif command == "night":
        night = {"run_date": config.run_date, "catch_up": 0, "keep_snapshots": 2, "grace_hours": 0}
        run_nightly(NightlyConfig.model_validate({"generate": config.model_dump(), **night}))
    elif command == "rate":
        known = find_rated(root, ratings, np.array(["real-0"], object), D, None)["item_id"].to_pylist()
        assert known == sorted(set(read_interactions(ratings).item_id))
    elif command == "collect":
        collect(root, keep=2, grace_hours=0)
    elif command == "roll back":
        roll_back(root)
    elif command == "publish":
        publish_snapshot(root, list_snapshots(root)[-1].run_id)
    elif command == "values":
        export_key_values(read_catalog(root), f"{root}-values", "jsonl")
    else:
        export_images(read_catalog(root), f"{root}-images", "https://cdn.example.com")


def is_possible(command: str, root: str) -> bool:
    """A first snapshot cannot be rolled back, nor one whose previous snapshot was collected."""
    if command != "roll back":
        return True
    published = read_catalog(root).manifest
    return published.previous_run_id in {manifest.run_id for manifest in list_snapshots(root)}


def rate_what_is_shown(generator: random.Random, config: GenerateConfig) -> InteractionSettings:
    """Write ratings of one shown item of every user."""
    rows = [
        (user, generator.choice(items)[1], 5.0, None) for user, items in sorted(shown(config.catalog).items())
    ]
    return rate(Path(config.request).with_name("ratings.parquet"), [row for row in rows if row[0]])


def free_leases(root: str) -> None:
    """The lease of a killed command is taken over after its time: let the time pass."""
    for folder in (root, f"{root}-values/jsonl", f"{root}-images"):
        if read_pointer(folder)[0].lease is not None:
            change_pointer(folder, lambda pointer: replace(pointer, lease=None))


def unexplained(root: str) -> list[str]:
    """Return the files of a catalog that no snapshot and no record of it names."""
    named = {"latest.json", ".latest.lock"}
    for manifest in list_snapshots(root):
        named |= {f"{manifest.path}/{name}" for name in ("manifest.json", ".manifest.lock")}
        named |= {manifest.files.path, f"runs/{manifest.run_id}.json"}
        named |= set(open_snapshot(root, manifest.path).files["path"].to_pylist())
    made_images = {name.split("/")[1].removeprefix("run_id=") for name in named if name.startswith("images/")}
    made_tables = {name.split("/")[2].removeprefix("run_id=") for name in named if "/bucket=" in name}
    named |= {f"runs/{run_id}.json" for run_id in made_images | made_tables}
    files = [uri.removeprefix(f"{root}/") for uri in list_files(root)]
    return sorted(path for path in files if path not in named and not path.startswith("rated/"))


def campaign(config: GenerateConfig, faults: Disk | Outage, *, seed: int, length: int) -> None:
    """Run the commands of a seed on a catalog with faults, and on its twin without."""
    generator = random.Random(1000 + seed)
    twin_root = config.catalog.replace("catalog", "twin")
    night, happened, errors = 0, 0, list[UserError]()
    for command in commands_of(seed, length):
        if command in ("generate", "night"):
            change_digest(config, generator.choice(USERS[:5]))
            night += 1
        today = request_for(config, USERS[: generator.randint(3, 5)], night)
        today = today.model_copy(update={"gate": NO_GATE, "run_date": date(2026, 3, night)})
        twin = today.model_copy(update={"catalog": twin_root})
        if not all(is_possible(command, one.catalog) for one in (today, twin)):
            continue
        ratings = rate_what_is_shown(generator, twin) if command == "rate" else NO_RATINGS
        run(command, twin, ratings)

        before = read_pointer(today.catalog)[0].run_id
        failure = faults.fail(generator, command)
        try:
            run(command, today, ratings)
        except Killed:
            assert failure.startswith("killed")
        except UserError as error:
            errors.append(error)
        happened += faults.mend()
        free_leases(today.catalog)
        # Whoever rolls back looks before doing it again.
        if command != "roll back" or read_pointer(today.catalog)[0].run_id == before:
            run(command, today, ratings)
        assert shown(today.catalog) == shown(twin_root), (command, failure)
        assert verify(read_catalog(today.catalog), "full") == []
    assert happened >= 2
    assert {error.exit_code for error in errors} <= {75}, errors

    for root in (config.catalog, twin_root):
        remove_leftovers(root, datetime.now(UTC))  # as if the hour in which a writer may return was over
        collect(root, keep=1, grace_hours=0)
        collect(root, keep=1, grace_hours=0)
        assert unexplained(root) == []
    assert len(list_snapshots(config.catalog)) == len(list_snapshots(twin_root))


@pytest.fixture(autouse=True)
def _nights_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nightly, "generate_catalog", partial(generate_catalog, in_process=True))
    monkeypatch.setattr(feedback, "for_each_bucket", partial(for_each_bucket, in_process=True))


@pytest.mark.parametrize("seed", range(SEEDS))
def test_no_fault_of_a_disk_loses_doubles_or_shows_anything(
    config: GenerateConfig, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    campaign(config, Disk(config.catalog, monkeypatch), seed=seed, length=LENGTH)


@pytest.mark.parametrize("seed", range(S3_SEEDS))
def test_no_outage_of_a_store_loses_doubles_or_shows_anything(
    config: GenerateConfig, proxy: FaultyS3, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.setattr(S3FileSystem, "retries", 1)
    config = config.model_copy(update={"catalog": f"s3://rebeca/campaign-{seed}/catalog"})
    campaign(config, Outage(proxy), seed=100 + seed, length=S3_LENGTH)
