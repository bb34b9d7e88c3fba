"""Two attempts at once: a second one begins at some operation of the first, and runs to its end."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

from rebeca_ray.catalog import lease
from rebeca_ray.catalog.pointer import change_pointer
from rebeca_ray.errors import UserError
from rebeca_ray.storage import local
from tests.faults.commands import Command
from tests.faults.disk import Counter, Operation, watched
from tests.faults.reader import Reader
from tests.faults.trial import Ended, attempt
from tests.faults.world import Lab, World

BEATING, SILENT = "second attempt", "second attempt after a silence"


class Beats:
    """All leases that are taken. While somebody waits for silence, those that live beat."""

    def __init__(self) -> None:
        self.leases: list[lease.Lease] = []

    def beat(self) -> None:
        for held in self.leases:
            if held.fencing_token and not held.released.is_set():
                try:
                    change_pointer(held.root, held.beat, held.kind)
                except UserError:
                    held.released.set()

    @contextmanager
    def heard(self, *, silent: bool) -> Iterator[None]:
        sleep, take = lease.time.sleep, lease.Lease.__init__

        def remember(held: lease.Lease, *arguments: Any) -> None:
            self.leases.append(held)
            held.fencing_token = 0
            take(held, *arguments)

        def sleep_and_beat(seconds: float) -> None:
            sleep(seconds)
            if not silent:
                self.beat()

        with (
            patch.object(lease.Lease, "__init__", remember),
            patch.object(lease.time, "sleep", sleep_and_beat),
        ):
            yield


class Rival(Counter):
    """Begins a second attempt at an operation, or at the next one while no lock is held."""

    def __init__(self, at: int, begin: Any, look: Any) -> None:
        super().__init__()
        self.at, self.begin, self.look = at, begin, look
        self.locks = 0
        self.busy = False
        self.ended: Ended | None = None

    def before(self, operation: Operation) -> None:
        if self.busy:
            return
        super().before(operation)
        if len(self.operations) > self.at and not self.locks and self.ended is None:
            self.busy = True
            self.ended = self.begin()
            self.busy = False

    def after(self, operation: Operation) -> None:
        if not self.busy and operation.is_change:
            self.busy = True
            self.look()
            self.busy = False

    @contextmanager
    def counting_locks(self) -> Iterator[None]:
        locked = local.locked

        @contextmanager
        def counted(path: Any) -> Iterator[None]:
            self.locks += 1
            try:
                with locked(path):
                    yield
            finally:
                self.locks -= 1

        with patch.object(local, "locked", counted):
            yield


@dataclass
class SecondAttempt:
    """The same command begins again at an operation. Its rival beats, or was silent for too long."""

    kind: str
    at: int
    happened: bool = False
    stall_minutes: float | None = None
    recovers: bool = True
    codes: tuple[int, ...] = (5, 75)

    @contextmanager
    def around(self, lab: Lab, command: Command, world: World, reader: Reader) -> Iterator[None]:
        rival = Rival(self.at, lambda: attempt(command, world), reader.look)
        with Beats().heard(silent=self.kind == SILENT), rival.counting_locks(), watched(world.root, rival):
            yield
        self.happened = rival.ended is not None
        if rival.ended:
            assert rival.ended.code in (0, *self.codes), rival.ended.text

    def between(self, world: World) -> None:
        pass
