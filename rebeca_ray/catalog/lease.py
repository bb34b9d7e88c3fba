"""One writer at a time: a run holds a lease in `latest.json`, with an epoch and a heartbeat.

Whoever starts raises the epoch. A lease whose beat stands still for its `seconds`, by the clock of the one who watches, is taken over:
no two machines' clocks are ever compared. What a stale run still writes carries an old epoch in its name and is never listed, and
it cannot publish, for that is a swap of the same object.
"""

import os
import secrets
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from rebeca_ray.catalog.pointer import LeaseState, Pointer, change_pointer, left_behind, read_pointer
from rebeca_ray.errors import LeaseHeldError, UserError

BEATS = 4  # in the time after which a silent lease is taken over


class Lease:
    """The right to write to a catalog, while it lasts."""

    def __init__(self, root: str, run_id: str, seconds: float) -> None:
        self.root, self.run_id, self.seconds = root, run_id, seconds
        self.holder = secrets.token_hex(8)  # another attempt at the same run is another holder
        self.lost: LeaseHeldError | None = None
        self.released = threading.Event()
        self.wait_for_silence()
        self.epoch = change_pointer(root, self.take).epoch

    def wait_for_silence(self) -> None:
        """Return once nobody holds the lease, or whoever does was silent for its time. Raises LeaseHeldError if they are not."""
        lease = self.watched = read_pointer(self.root)[0].lease
        if lease is None:
            return
        deadline = time.monotonic() + lease["seconds"]
        while time.monotonic() < deadline:
            time.sleep(min(0.5, lease["seconds"] / BEATS))
            now = read_pointer(self.root)[0].lease
            if now is None:
                self.watched = None
                return
            if now != lease:
                raise self.refused(now)

    def refused(self, lease: LeaseState) -> LeaseHeldError:
        return LeaseHeldError(
            f"catalog {self.root}: run {lease['run_id']} (epoch {lease['epoch']}) is at work on it; wait for it, or stop it and start again"
        )

    def take(self, pointer: Pointer) -> Pointer:
        if pointer.lease is not None and pointer.lease.get("holder") == self.holder:
            return pointer  # stored, but the answer was lost
        if pointer.lease is not None and pointer.lease != self.watched:
            raise self.refused(pointer.lease)
        epoch = pointer.epoch + 1
        lease: LeaseState = {
            "run_id": self.run_id,
            "epoch": epoch,
            "holder": self.holder,
            "beat": 0,
            "seconds": self.seconds,
        }
        return replace(pointer, epoch=epoch, lease=lease)

    def own(self, pointer: Pointer) -> LeaseState:
        """The lease as it stands. Raises LeaseHeldError if it is another's by now."""
        if pointer.lease is None or pointer.lease.get("holder") != self.holder:
            to = f"run {pointer.lease['run_id']}" if pointer.lease else "one that has ended"
            raise LeaseHeldError(
                f"catalog {self.root}: run {self.run_id} (epoch {self.epoch}) was silent for more than {self.seconds:g} s and lost its "
                f"lease to {to}; it publishes nothing, start it again to resume"
            )
        return pointer.lease

    def beat(self, pointer: Pointer) -> Pointer:
        lease = self.own(pointer)
        beaten: LeaseState = {**lease, "run_id": self.run_id, "beat": lease["beat"] + 1}
        return replace(pointer, lease=beaten)

    def keep_beating(self) -> None:
        """Beat until released. An unreachable store is no loss: whoever takes over has to reach it first."""
        while not self.released.wait(self.seconds / BEATS):
            try:
                change_pointer(self.root, self.beat)
            except LeaseHeldError as error:
                self.lost = error
                while not self.released.wait(1):  # until it is heard: Ray may be waiting in C
                    os.kill(os.getpid(), signal.SIGINT)
                return
            except UserError:
                continue

    def check(self) -> None:
        """Raise LeaseHeldError if the lease is another's by now."""
        self.own(read_pointer(self.root)[0])

    def publish(self, *, run_id: str, run_date: str, snapshot: str, forced: bool = False) -> None:
        """Point readers at a complete snapshot. Raises LeaseHeldError if the lease is another's by now."""

        def move(pointer: Pointer) -> Pointer:
            self.own(pointer)
            return replace(
                pointer,
                run_id=run_id,
                run_date=run_date,
                snapshot=snapshot,
                forced=forced,
                left=left_behind(pointer, run_id),
            )

        change_pointer(self.root, move)

    def release(self) -> None:
        try:
            change_pointer(
                self.root, lambda pointer: replace(pointer, lease=None) if self.own(pointer) else pointer
            )
        except UserError:
            return  # another's by now, or out of reach: then it runs out


@contextmanager
def hold_lease(root: str, run_id: str, seconds: float) -> Iterator[Lease]:
    """Hold the lease of the catalog at `root` inside the block; a run that loses it is interrupted there.

    Raises LeaseHeldError (exit code 5) if another run is at work, or takes over.
    """
    lease = Lease(root, run_id, seconds)
    main = threading.current_thread() is threading.main_thread()

    def interrupt(*_: object) -> None:
        if not (
            lease.lost and lease.released.is_set()
        ):  # a loss noticed at the very end interrupts nothing any more
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
        if main:
            signal.signal(signal.SIGINT, before)
