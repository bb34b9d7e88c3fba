"""Send reports from a thread of their own, so that no slow or lost receiver can hold up a run."""

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rebeca_ray.errors import describe

log = logging.getLogger(__name__)


class UndeliveredError(Exception):
    """A report that a receiver did not take, for a reason that holds no secret."""


class Sender:
    """Makes deliveries to one receiver, one after the other. A failure is one warning in the log."""

    def __init__(self, receiver: str) -> None:
        self.receiver = receiver
        self.deliveries: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self.warned = False
        self.thread = threading.Thread(target=self.deliver_all, name=receiver, daemon=True)
        self.thread.start()

    def send(self, deliver: Callable[[], object]) -> None:
        """Make a delivery after those before it, and return at once."""
        self.deliveries.put(deliver)

    def deliver_all(self) -> None:
        while deliver := self.deliveries.get():
            try:
                deliver()
            except UndeliveredError as error:
                self.warn(str(error))
            except Exception as error:  # of any client: no report may end a run
                self.warn(f"{type(error).__name__}: {describe(error)}")

    def warn(self, reason: str) -> None:
        if not self.warned:
            log.warning("%s: a report was not delivered (%s); the result stands", self.receiver, reason)
        self.warned = True

    def close(self, seconds: float) -> None:
        """Return once all deliveries are made, after `seconds` at the latest."""
        self.deliveries.put(None)
        began = time.monotonic()
        self.thread.join(seconds)
        if self.thread.is_alive():
            self.warn(f"no answer within {time.monotonic() - began:.1f} s")


@contextmanager
def tolerating_errors(action: str) -> Iterator[None]:
    """Log any error of a report as one warning: everything that counts is done by then."""
    try:
        yield
    except Exception as error:
        log.warning("%s failed (%s: %s); the result stands", action, type(error).__name__, describe(error))
