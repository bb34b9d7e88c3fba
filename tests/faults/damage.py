"""Files that are damaged between a kill and the repeat: one that the killed attempt wrote."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rebeca_ray.storage.local import PARTIAL
from tests.faults.commands import Command
from tests.faults.disk import KILLED, FailingDisk, watched
from tests.faults.reader import Reader
from tests.faults.world import Lab, World
from tests.generation.test_damage import flip, truncate

DAMAGES: dict[str, Callable[[Path], object]] = {
    "truncated": truncate,
    "emptied": lambda path: path.write_bytes(b""),
    "flipped": flip,
}


@dataclass
class DamagedFile:
    """A file of a killed attempt is damaged before the repeat; nothing that was published by then."""

    kind: str
    at: int
    seed: int
    happened: bool = False
    stall_minutes: float | None = None
    recovers: bool = True
    codes: tuple[int, ...] = (KILLED,)
    path: str = ""

    @contextmanager
    def around(self, lab: Lab, command: Command, world: World, reader: Reader) -> Iterator[None]:
        self.before = files_below(world)
        self.views = command.views or reader.expected
        stamps = {view.name: view.stamp(world) for view in reader.expected}
        with watched(world.root, FailingDisk("killed before", self.at, reader.look)):
            yield
        self.is_published = {view.name: view.stamp(world) for view in reader.expected} != stamps

    def between(self, world: World) -> None:
        new = sorted(files_below(world) - self.before)
        if new and not self.is_published:
            path = random.Random(self.seed).choice(new)
            DAMAGES[self.kind](path)
            self.path, self.happened = str(path.relative_to(world.root)), True


def files_below(world: World) -> set[Path]:
    """Return the files with a content that somebody reads."""
    return {
        path
        for path in Path(world.root).rglob("*")
        if path.is_file()
        and path.stat().st_size
        and path.name != "latest.json"
        and not PARTIAL.search(path.name)
        and not is_record_of_nothing(path)
    }


def is_record_of_nothing(path: Path) -> bool:
    """Return whether a file is the record of a run that wrote nothing else.

    Once damaged it stays, with a warning: gc removes no record that it cannot read.
    """
    work = path.parents[1] / "work" / f"run_id={path.stem}" / "run.json"
    return path.parent.name == "runs" and not work.exists()
