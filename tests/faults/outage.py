"""An S3 server that fails at some request of a command, once or until it is mended."""

import itertools
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from unittest.mock import patch

from s3fs import S3FileSystem

from rebeca_ray.storage.filesystem import open_filesystem
from tests.faults.commands import Command
from tests.faults.reader import Reader
from tests.faults.world import Lab, World
from tests.faulty_s3 import Fault, FaultyS3, forever

BUCKET = "s3://rebeca/faults"
OUTAGES: tuple[Fault, ...] = ("slow down", "error", "lost", "cut", "gone")


class RemoteLab(Lab):
    """Copies the states of a lab to an S3 server behind a faulty proxy, each time to another prefix."""

    def __init__(self, lab: Lab, proxy: FaultyS3) -> None:
        self.folder, self.world, self.drawn, self.proxy = lab.folder, lab.world, lab.drawn, proxy
        self.numbers = itertools.count()

    def fresh(self, state: str) -> World:
        world = replace(self.world, root=f"{BUCKET}-{next(self.numbers)}")
        folder = self.folder / "states" / state
        filesystem, prefix = open_filesystem(world.root)
        files = {
            f"{prefix}/{file.relative_to(folder)}": file.read_bytes()
            for file in folder.rglob("*")
            if file.is_file() and is_on_a_server(file.relative_to(folder))
        }
        for wait in (1, 2, 4):
            with suppress(OSError):  # a new server that still makes room
                filesystem.pipe(files)
                return world
            time.sleep(wait)
        raise OSError("the S3 server takes no files")


def is_on_a_server(path: Path) -> bool:
    """Return whether a file of a local state belongs into one on a server: neither locks nor Iceberg."""
    return path.suffix != ".lock" and path.parts[0] not in ("iceberg.db", "warehouse")


@dataclass
class Outage:
    """Request number `at` fails, and with `lasting` all later ones too, until the first attempt ends."""

    fault: Fault
    at: int
    lasting: bool
    happened: bool = False
    stall_minutes: float | None = None
    recovers: bool = True
    codes: tuple[int, ...] = (75,)

    @property
    def kind(self) -> str:
        return f"S3 {self.fault}{', lasting' if self.lasting else ''}"

    @contextmanager
    def around(self, lab: Lab, command: Command, world: World, reader: Reader) -> Iterator[None]:
        assert isinstance(lab, RemoteLab)
        fault = forever(self.fault) if self.lasting else iter([self.fault])
        lab.proxy.misbehave(itertools.chain([""] * self.at, fault))
        with patch.object(S3FileSystem, "retries", 1):
            yield
        self.happened = any(request.fault for request in lab.proxy.requests)
        lab.proxy.misbehave([])

    def between(self, world: World) -> None:
        pass
