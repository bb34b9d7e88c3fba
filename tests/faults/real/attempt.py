"""One attempt of a night, in a process of its own. Its output shows the stage that it is in."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from tests.conftest import REPO
from tests.faults.real.kinds import STAGES
from tests.faults.real.world import World

STUCK_SECONDS = 180  # without a new stage and without a fault
ERROR = re.compile(r"error: |[\d:]+ ERROR run \S+: no progress for ")  # of the command, or of its watchdog


class Night:
    """One attempt, from its start to its end."""

    def __init__(self, world: World, config: Path, *options: str) -> None:
        self.lines: list[str] = []
        self.stages: list[str] = []
        self.moved_at = time.monotonic()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.real.night", str(config), *options],
            env={**os.environ, "AWS_ENDPOINT_URL": world.proxy.url, "RAY_ADDRESS": world.cluster.address},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=REPO,
        )
        threading.Thread(target=self.follow, daemon=True).start()

    def follow(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self.lines.append(line.rstrip())
            if line.startswith("stage "):
                self.stages.append(line.split()[1])
                self.moved_at = time.monotonic()

    def wait_for(self, stage: str) -> bool:
        """Wait until a stage or a later one began. Return whether the attempt is in it."""
        later = STAGES[STAGES.index(stage) :]
        while self.process.poll() is None and not self.is_stuck():
            if any(name in later for name in self.stages):
                return self.stages[-1] == stage
            time.sleep(0.05)
        return False

    def is_stuck(self) -> bool:
        return time.monotonic() - self.moved_at > STUCK_SECONDS

    def end(self) -> int | None:
        """Wait for the end; return the exit code, or None for an attempt that is stuck, with its stacks."""
        while self.process.poll() is None:
            if self.is_stuck():
                self.process.send_signal(signal.SIGUSR1)  # writes the stacks to its output
                time.sleep(3)
                self.process.kill()
                self.process.wait()
                return None
            time.sleep(0.1)
        time.sleep(0.2)  # for the last lines
        return self.process.returncode

    def complaints(self) -> list[str]:
        """Return the problems of the attempt's end: a traceback, a wrong code, not exactly one line."""
        code, errors = self.process.returncode, [line for line in self.lines if ERROR.match(line)]
        problems = []
        if any(re.match(r"Traceback", line) for line in self.lines):
            problems.append("traceback")
        if code not in (0, -signal.SIGKILL) and len(errors) != 1:
            problems.append(f"{len(errors)} error lines with code {code}")
        return problems
