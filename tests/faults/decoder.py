"""A decoder that fails: a row that kills its process, and a decoder that hangs."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from unittest.mock import patch

from rebeca_ray import watchdog
from tests.faults.commands import Command
from tests.faults.disk import KILLED, FailingDisk, Killed, watched
from tests.faults.reader import Reader
from tests.faults.trial import attempt
from tests.faults.world import Lab, World

DEATHS = 4  # of one row: two with others, two alone
POISON, STALLED = "poison row", "stalled decoder"


@dataclass
class PoisonRow:
    """Row number `at` of those that a command draws kills its process, until the row is left out."""

    seed: int
    at: int
    kind: str = POISON
    happened: bool = False
    stall_minutes: float | None = None
    recovers: bool = False
    codes: tuple[int, ...] = (KILLED,)

    @contextmanager
    def around(self, lab: Lab, command: Command, world: World, reader: Reader) -> Iterator[None]:
        self.lab, self.command, self.look = lab, command, reader.look
        with self.poisoned(world):
            yield

    @contextmanager
    def poisoned(self, world: World) -> Iterator[None]:
        disk = FailingDisk("killed by a row", -1, self.look)

        def kill(seeds: list[int]) -> None:
            if self.seed in seeds:
                disk.dead = self.happened = True
                raise Killed

        with watched(world.root, disk), patch.object(self.lab.drawn, "disturb", kill):
            yield

    def between(self, world: World) -> None:
        """Repeat the command until the row has killed often enough."""
        for _ in range(DEATHS - 1):
            with self.poisoned(world):
                assert attempt(self.command, world).code == KILLED
        with self.poisoned(world):
            ended = attempt(self.command, world)
        assert ended.code == 0, ended.text


@dataclass
class StalledDecoder:
    """Row number `at` hangs. The watchdog ends the process."""

    seed: int
    at: int
    kind: str = STALLED
    happened: bool = False
    stall_minutes: float | None = 0.01
    recovers: bool = True
    codes: tuple[int, ...] = (KILLED,)  # as the others see it; the exit code is checked below

    @contextmanager
    def around(self, lab: Lab, command: Command, world: World, reader: Reader) -> Iterator[None]:
        disk = FailingDisk("killed by the watchdog", -1, reader.look)
        ended = threading.Event()

        def end(code: int) -> None:
            assert code == 75
            disk.dead = self.happened = True
            ended.set()

        def hang(seeds: list[int]) -> None:
            if self.seed in seeds:
                assert ended.wait(60), "the watchdog sleeps"
                raise Killed

        with (
            watched(world.root, disk),
            patch.object(lab.drawn, "disturb", hang),
            patch.object(watchdog.os, "_exit", end),
        ):
            yield

    def between(self, world: World) -> None:
        pass
