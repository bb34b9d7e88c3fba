"""Termination: end on SIGTERM as on an error, so that leases are freed and partial files removed."""

import signal
import threading
from types import FrameType

sigterm = threading.Event()  # set once SIGTERM was received


def unwind_on_sigterm() -> None:
    """Let SIGTERM raise KeyboardInterrupt in the main thread, instead of ending the process on the spot.

    No other exception leaves Ray's waiting code: SystemExit ends the process there, with code 1. A second
    SIGTERM ends the process on the spot. Called again after every library that sets its own handler.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, unwind)


def unwind(number: int, _: FrameType | None) -> None:
    signal.signal(number, signal.SIG_DFL)
    sigterm.set()
    raise KeyboardInterrupt
