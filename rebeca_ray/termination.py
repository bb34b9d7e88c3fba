"""Termination: end on Ctrl-C or SIGTERM as on an error: leases are freed and partial files removed."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
sigterm = threading.Event()  # set once SIGTERM was received


@contextmanager
def unwinding() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM raise KeyboardInterrupt in the block; the next one ends the process on the spot.

    No other exception leaves Ray's waiting code: SystemExit ends the process there, with code 1. A signal
    that the process ignores stays ignored.
    """
    sigterm.clear()
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, unwind)
    try:
        yield
    finally:
        for number, handler in before.items():
            # After a first signal the next one still ends the process, without a traceback while Ray ends.
            if signal.getsignal(number) is not signal.SIG_DFL:
                signal.signal(number, handler)


def unwind(number: int, _: FrameType | None) -> None:
    for each in SIGNALS:
        signal.signal(each, signal.SIG_DFL)
    if number == signal.SIGTERM:
        sigterm.set()
    raise KeyboardInterrupt


@contextmanager
def keep_sigterm() -> Iterator[None]:
    """Put the handler of SIGTERM back that the block replaces; without an earlier one, leave the new one."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if callable(before) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)
