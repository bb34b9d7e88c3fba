"""One writer at a time: a run holds a lease in `latest.json`, with a fencing token and a heartbeat.

Each new holder gets the next higher token. A lease whose heartbeat stops for its `seconds` is taken over. The
watcher's own clock measures that time, so the clocks of two machines are never compared. Files of a stale run
carry an old token in their names and are never listed. A stale run cannot publish either: publishing is a
compare-and-swap of the same object.
"""

import logging
import os
import secrets
import signal
import threading
import time
import uuid
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import FrameType

from rebeca_ray.catalog.pointer import (
    POINTERS_OF,
    Kind,
    LeaseState,
    Pointer,
    change_pointer,
    moved,
    read_pointer,
)
from rebeca_ray.errors import LeaseHeldError, ResumableError, UserError
from rebeca_ray.storage.filesystem import delete_swapped, join
from rebeca_ray.storage.swap_probe import require_swaps

log = logging.getLogger(__name__)

BEATS = 4  # heartbeats in the time after which a silent lease is taken over


class Lease:
    """The right to write to a catalog, or to another folder with a pointer, while it lasts."""

    def __init__(self, root: str, run_id: str, seconds: float, kind: Kind = "catalog") -> None:
        self.root, self.run_id, self.seconds, self.kind = root, run_id, seconds, kind
        self.holder = secrets.token_hex(8)  # another attempt at the same run is another holder
        self.lost: LeaseHeldError | None = None
        self.released = threading.Event()
        self.fencing_token = 0
        require_swaps(root)
        self.wait_for_silence()
        try:
            taken = change_pointer(root, self.take, kind)
        except (KeyboardInterrupt, SystemExit):
            self.release()  # it may be taken already
            raise
        self.fencing_token, self.catalog_id = taken.fencing_token, taken.catalog_id or ""
        self.published = taken.run_id  # what this run replaces

    def wait_for_silence(self) -> None:
        """Return once the lease is free, or its holder was silent for its time.

        Raises LeaseHeldError at a heartbeat.
        """
        lease = self.watched = read_pointer(self.root, self.kind)[0].lease
        if lease is None:
            return
        deadline = time.monotonic() + lease["seconds"]
        while time.monotonic() < deadline:
            time.sleep(min(0.5, lease["seconds"] / BEATS))
            now = read_pointer(self.root, self.kind)[0].lease
            if now is None:
                self.watched = None
                return
            if now != lease:
                raise self.refused(now)

    def refused(self, lease: LeaseState) -> LeaseHeldError:
        return LeaseHeldError(
            f"{self.kind} {self.root}: run {lease['run_id']} (fencing token {lease['fencing_token']}) "
            "is at work on it; wait for it, or stop it and start again"
        )

    def take(self, pointer: Pointer) -> Pointer:
        if pointer.lease is not None and pointer.lease.get("holder") == self.holder:
            return pointer  # the write was stored, but its answer was lost
        if pointer.lease is not None and pointer.lease != self.watched:
            raise self.refused(pointer.lease)
        token = pointer.fencing_token + 1
        lease: LeaseState = {
            "run_id": self.run_id,
            "fencing_token": token,
            "holder": self.holder,
            "beat": 0,
            "seconds": self.seconds,
        }
        catalog_id = pointer.catalog_id or uuid.uuid4().hex
        return replace(pointer, catalog_id=catalog_id, fencing_token=token, lease=lease)

    def held(self, pointer: Pointer) -> LeaseState:
        """Return the lease as it stands. Raises LeaseHeldError if another run holds it by now."""
        if pointer.lease is None or pointer.lease.get("holder") != self.holder:
            heir = f"run {pointer.lease['run_id']}" if pointer.lease else "one that has ended"
            raise LeaseHeldError(
                f"{self.kind} {self.root}: run {self.run_id} (fencing token {self.fencing_token}) "
                f"was silent for more than {self.seconds:g} s and lost its lease to {heir}; "
                "it publishes nothing, start it again to resume"
            )
        return pointer.lease

    def beat(self, pointer: Pointer) -> Pointer:
        lease = self.held(pointer)
        beaten: LeaseState = {**lease, "run_id": self.run_id, "beat": lease["beat"] + 1}
        return replace(pointer, lease=beaten)

    def keep_beating(self) -> None:
        """Beat until released. An unreachable store is no loss: an heir would have to reach it first."""
        while not self.released.wait(self.seconds / BEATS):
            try:
                change_pointer(self.root, self.beat, self.kind)
            except LeaseHeldError as error:
                if self.released.is_set():
                    return  # it was given up while this beat was on its way
                self.lost = error
                while not self.released.wait(1):  # repeated until it is heard: Ray may be waiting in C
                    os.kill(os.getpid(), signal.SIGINT)
                return
            except UserError:
                continue

    def check(self) -> None:
        """Raise LeaseHeldError if another run holds the lease by now."""
        self.held(read_pointer(self.root, self.kind)[0])

    def publish(self, *, run_id: str, run_date: str, snapshot: str, forced: bool = False) -> None:
        """Point readers at a complete snapshot.

        Raises LeaseHeldError if another run holds the lease by now, and ResumableError if somebody published
        another snapshot by hand, or rolled one back, since the lease was taken.
        """

        def move(pointer: Pointer) -> Pointer:
            self.held(pointer)
            if pointer.run_id not in (self.published, run_id):
                raise ResumableError(
                    f"{self.kind} {self.root}: run {pointer.run_id} was published by hand while "
                    f"run {run_id} was at work, which follows {self.published}. Its snapshot {snapshot} "
                    "stays unpublished; start again for one that follows what is published now"
                )
            return moved(pointer, run_id=run_id, run_date=run_date, snapshot=snapshot, forced=forced)

        change_pointer(self.root, move, self.kind)

    def doom(self, run_ids: Collection[str]) -> None:
        """Name the runs that garbage collection removes next; none once they are gone.

        Raises LeaseHeldError if the lease is lost, or if one of them was published meanwhile.
        """

        def name(pointer: Pointer) -> Pointer:
            self.held(pointer)
            if pointer.run_id in run_ids:
                raise LeaseHeldError(
                    f"{self.kind} {self.root}: run {pointer.run_id} was published while garbage was being "
                    "collected; nothing was removed, collect again"
                )
            return replace(pointer, doomed=tuple(sorted(run_ids)))

        change_pointer(self.root, name, self.kind)

    def remove_pointer(self) -> None:
        """Remove the pointer of a catalog that was never published, and end this lease with it."""
        self.released.set()
        self.check()
        delete_swapped(join(self.root, POINTERS_OF[self.kind]))

    def release(self) -> None:
        def free(pointer: Pointer) -> Pointer:
            self.held(pointer)
            return replace(pointer, lease=None)

        try:
            change_pointer(self.root, free, self.kind)
        except LeaseHeldError:
            return  # another run holds it by now
        except UserError as error:
            log.warning("the lease is not freed and expires in %g s: %s", self.seconds, error)


@contextmanager
def hold_lease(root: str, run_id: str, seconds: float, kind: Kind = "catalog") -> Iterator[Lease]:
    """Hold the lease of the catalog, or of another `kind` of folder, at `root` inside the block.

    A run that loses it is interrupted there. Raises LeaseHeldError if another run is at work, or takes over.
    """
    lease = Lease(root, run_id, seconds, kind)
    main = threading.current_thread() is threading.main_thread()

    def interrupt(number: int, frame: FrameType | None) -> None:
        if lease.lost and lease.released.is_set():
            return  # a loss that is noticed at the very end interrupts nothing any more
        if not lease.lost and callable(before):
            before(number, frame)  # of a command: a second Ctrl-C ends the process
        raise KeyboardInterrupt

    # A process that a shell starts with `&` ignores SIGINT, and would go on without its lease.
    before = signal.signal(signal.SIGINT, interrupt) if main else None
    thread = threading.Thread(target=lease.keep_beating, name="lease", daemon=True)
    thread.start()
    try:
        yield lease
    except BaseException:
        lease.released.set()  # before anything else: the interrupt is sent until it is heard
        if lease.lost:
            raise lease.lost from None
        raise
    finally:
        lease.released.set()
        thread.join(10)
        if not lease.lost:
            lease.release()
        if main and signal.getsignal(signal.SIGINT) is interrupt:
            signal.signal(signal.SIGINT, before)
