"""Termination: end on SIGTERM as on an error, so that leases are freed and partial files removed."""

import os
import signal
import threading
from types import FrameType

SIGTERM_LINE = b"error: SIGTERM was received; the command stopped before completion; start it again\n"


def unwind_on_sigterm() -> None:
    """Let SIGTERM raise SystemExit(143) in the main thread, instead of ending the process on the spot.

    A second SIGTERM ends it on the spot. Called again after every library that sets its own handler.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, unwind)


def unwind(number: int, _: FrameType | None) -> None:
    signal.signal(number, signal.SIG_DFL)
    os.write(2, SIGTERM_LINE)  # print may be interrupted in the middle of another print
    raise SystemExit(128 + number)
