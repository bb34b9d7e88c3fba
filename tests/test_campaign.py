"""A small seeded campaign: a command dies, or meets a failing disk, at any change it makes, and is repeated.

A twin catalog gets the same commands without faults. Both must always show the same items, and in the end
nothing else may be left.
"""

import errno
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from rebeca_ray.catalog.exports.image_objects import export_images
from rebeca_ray.catalog.exports.key_values import export_key_values
from rebeca_ray.catalog.gc import collect
from rebeca_ray.catalog.pointer import change_pointer, read_pointer
from rebeca_ray.catalog.read import open_snapshot, read_catalog
from rebeca_ray.catalog.snapshots import list_snapshots, publish_snapshot, roll_back
from rebeca_ray.catalog.verify import verify
from rebeca_ray.config.jobs import GenerateConfig
from rebeca_ray.errors import UserError
from rebeca_ray.generation.pipeline import generate_catalog
from tests.conftest import NO_GATE, USERS
from tests.generation.test_nights import change_digest, request_for

SEEDS, LENGTH = 3, 7
COMMANDS = ("generate", "generate", "collect", "roll back", "publish", "values", "images")
FAILURES = ("killed before", "killed after", "input/output error", "disk full")
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

    def fail(self, after: int, failure: str) -> None:
        self.left, self.failure, self.dead = after, failure, False

    def mend(self) -> bool:
        """End all failures. Return whether one happened."""
        happened, self.left, self.dead = self.left is None, None, False
        return happened


def shown(root: str) -> dict[str, list[tuple[int, str]]]:
    """Return rank and id of every user's items, as a reader sees them."""
    users: dict[str, list[tuple[int, str]]] = {}
    for row in read_catalog(root).items(["user_id", "rank", "item_id"]).to_pylist():
        users.setdefault(row["user_id"], []).append((row["rank"], row["item_id"]))
    return users


def commands_of(seed: int) -> Iterator[str]:
    generator = random.Random(seed)
    yield "generate"
    for _ in range(LENGTH):
        yield generator.choice(
            ["generate", "generate", "collect", "roll back", "publish", "values", "images"]
        )


def run(command: str, config: GenerateConfig) -> None:
    root = config.catalog
    if command == "generate":
        generate_catalog(config, in_process=True)
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
    files = [path for path in Path(root).rglob("*") if path.is_file()]
    return sorted(str(path.relative_to(root)) for path in files if str(path.relative_to(root)) not in named)


@pytest.mark.parametrize("seed", range(SEEDS))
def test_no_fault_loses_doubles_or_shows_anything(
    config: GenerateConfig, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    generator = random.Random(1000 + seed)
    disk = Disk(config.catalog, monkeypatch)
    twin_root = str(Path(config.catalog).with_name("twin"))
    night = 0
    happened, errors = 0, list[UserError]()
    for command in commands_of(seed):
        if command == "generate":
            change_digest(config, generator.choice(USERS[:5]))
            night += 1
        today = request_for(config, USERS[: generator.randint(3, 5)], night)
        today = today.model_copy(update={"gate": NO_GATE, "run_date": date(2026, 3, night)})
        twin = today.model_copy(update={"catalog": twin_root})
        if not all(is_possible(command, one.catalog) for one in (today, twin)):
            continue
        run(command, twin)

        before = read_pointer(today.catalog)[0].run_id
        failure = generator.choice(FAILURES)
        disk.fail(generator.randrange(60 if command == "generate" else 12), failure)
        try:
            run(command, today)
        except Killed:
            assert failure.startswith("killed")
        except UserError as error:
            errors.append(error)
        happened += disk.mend()
        free_leases(today.catalog)
        # Whoever rolls back looks before doing it again.
        if command != "roll back" or read_pointer(today.catalog)[0].run_id == before:
            run(command, today)
        assert shown(today.catalog) == shown(twin_root), (command, failure)
        assert verify(read_catalog(today.catalog), "full") == []
    assert happened >= 3
    assert {error.exit_code for error in errors} <= {75}, errors

    for root in (config.catalog, twin_root):
        for path in Path(root).rglob("*.partial-*"):
            os.utime(path, (0, 0))  # the hour passes in which somebody may still be writing it
        collect(root, keep=1, grace_hours=0)
        collect(root, keep=1, grace_hours=0)
        assert unexplained(root) == []
    assert len(list_snapshots(config.catalog)) == len(list_snapshots(twin_root))
