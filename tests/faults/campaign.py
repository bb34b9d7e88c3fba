"""A campaign: N seeded faults, a table of their ends, and a JSON file with the figures.

`python -m tests.faults.campaign --faults 1000 --seed 1`
"""

import argparse
import json
import logging
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import D
from tests.faults.commands import COMMANDS, Command
from tests.faults.damage import DAMAGES, DamagedFile
from tests.faults.decoder import POISON, STALLED, PoisonRow, StalledDecoder
from tests.faults.disk import KINDS, DiskFault, fits
from tests.faults.outage import OUTAGES, Outage, RemoteLab
from tests.faults.rivals import BEATING, SILENT, SecondAttempt
from tests.faults.trial import Fault, Trial, Twin, run_trial, undisturbed
from tests.faults.world import Lab

PROBLEMS = ("lost", "doubled", "half seen", "stuck", "left", "exit", "redone")
# Of 100 faults, by family. The rest are of the disk.
SHARES = {"S3": 12, "damage": 12, "rival": 8, POISON: 3, STALLED: 2}
REQUESTS = {"first night": 220, "night": 200, "nightly": 400, "gc": 200, "export images": 120}
AT_ONCE = 50  # faults between two results
DRAWING = [command for command in COMMANDS if command.draws]
LEAVING = [command for command in COMMANDS if command.draws or command.name.startswith("export")]
REMOTE = [command for command in COMMANDS if not command.local]
RIVALS = [command for command in COMMANDS if not command.once]


@dataclass
class Campaign:
    """A lab, the undisturbed runs of all commands, and the results so far."""

    lab: Lab
    twins: dict[str, Twin]
    remote: RemoteLab | None = None

    @classmethod
    def of(cls, lab: Lab, remote: RemoteLab | None = None) -> "Campaign":
        return cls(lab, {command.name: undisturbed(lab, command) for command in COMMANDS}, remote)

    def plan(self, number: int, seed: int) -> list[tuple[Command, Fault]]:
        """Return commands and faults: those of the disk without a repeat, the others at seeded places."""
        generator = random.Random(seed)
        families = generator.choices(
            [*SHARES, "disk"], [*SHARES.values(), 100 - sum(SHARES.values())], k=number
        )
        every = [*self.disk_faults()]
        disk = iter(generator.sample(every, min(len(every), families.count("disk"))))
        plan = []
        for family in families:
            made = next(disk, None) if family == "disk" else self.fault(family, generator)
            plan += [made] if made else []
        return plan

    def disk_faults(self) -> Iterator[tuple[Command, Fault]]:
        """Yield every failure of a disk at every operation of every command."""
        for command in COMMANDS:
            for at, operation in enumerate(self.twins[command.name].operations):
                for kind in KINDS:
                    if fits(kind, operation):
                        yield command, DiskFault(kind, at)

    def fault(self, family: str, generator: random.Random) -> tuple[Command, Fault] | None:
        if family == "S3":
            if self.remote is None:
                return None
            command = generator.choice(REMOTE)
            at = generator.randrange(REQUESTS.get(command.name, 60))
            return command, Outage(generator.choice(OUTAGES), at, lasting=generator.random() < 0.7)
        if family == "damage":
            command = generator.choice([command for command in LEAVING if not command.local])
            at = generator.randrange(len(self.twins[command.name].operations))
            return command, DamagedFile(generator.choice([*DAMAGES]), at, generator.randrange(2**32))
        if family == "rival":
            command = generator.choice(RIVALS)
            at = generator.randrange(len(self.twins[command.name].operations))
            return command, SecondAttempt(generator.choice([BEATING, SILENT]), at)
        command = generator.choice(DRAWING)
        seeds = self.twins[command.name].seeds
        at = generator.randrange(len(seeds))
        return command, (PoisonRow if family == POISON else StalledDecoder)(seed=seeds[at], at=at)

    def figures(self, number: int, seed: int) -> Iterator[dict[str, Any]]:
        """Run a plan, print its problems, and yield the figures so far, some faults at a time."""
        began, plan, trials = time.process_time(), self.plan(number, seed), list[Trial]()
        for command, fault in plan:
            trial = self.run(command, fault)
            trials.append(trial)
            for kind, texts in trial.problems.items():
                print(f"{trial.command}, {trial.kind} at {trial.at}: {kind}: {texts[0]}", flush=True)
            if len(trials) % AT_ONCE == 0 or len(trials) == len(plan):
                yield {
                    "seed": seed,
                    "planned": len(trials),
                    **summary(trials),
                    "operations": {name: len(twin.operations) for name, twin in self.twins.items()},
                    "possible_on_a_disk": len([*self.disk_faults()]),
                    "cpu_seconds": round(time.process_time() - began),
                }

    def run(self, command: Command, fault: Fault) -> Trial:
        if isinstance(fault, Outage):
            assert self.remote is not None
            return run_trial(self.remote, command, fault, self.twins[command.name])
        twin = self.twins[command.name]
        if isinstance(fault, PoisonRow):
            twin = undisturbed(self.lab, command, refused=fault.seed)
        return run_trial(self.lab, command, fault, twin)


def summary(trials: list[Trial]) -> dict[str, Any]:
    """Return the figures of a campaign: only faults that happened count."""
    happened = [trial for trial in trials if trial.happened]
    recovery = [trial.seconds_to_recover for trial in happened if trial.seconds_to_recover]
    late = [trial.redone for trial in happened if trial.redone is not None]
    return {
        "faults": len(happened),
        "by_kind": dict(sorted(Counter(trial.kind for trial in happened).items())),
        "by_command": dict(sorted(Counter(trial.command for trial in happened).items())),
        "distinct": len({(trial.command, trial.kind, trial.at) for trial in happened}),
        "exit_codes": {str(code): count for code, count in Counter(t.code for t in happened).items()},
        "problems": {kind: sum(kind in trial.problems for trial in happened) for kind in PROBLEMS},
        "seconds_to_recover": {
            "median": round(statistics.median(recovery), 3) if recovery else 0.0,
            "max": round(max(recovery, default=0.0), 3),
        },
        "most_redone_after_a_kill_at_90_percent": max(late, default=0.0),
    }


@contextmanager
def remote_of(lab: Lab, folder: Path) -> Iterator[RemoteLab]:
    """Yield a lab on an S3 server behind a faulty proxy."""
    from tests.faulty_s3 import impatient_proxy
    from tests.seaweedfs import seaweedfs

    with (
        seaweedfs(folder) as server,
        pytest.MonkeyPatch.context() as patch,
        impatient_proxy(server, patch) as proxy,
    ):
        yield RemoteLab(lab, proxy)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--faults", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--write", type=Path, help="JSON file for the figures")
    arguments = parser.parse_args()
    os.fsync = lambda _: None  # as in the tests
    logging.disable(logging.WARNING)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the S3 server ends, too
    with tempfile.TemporaryDirectory(prefix="faults") as name:
        folder = Path(name)
        lab = Lab(folder / "lab", tiny_decoder(folder / "decoder"))
        (folder / "s3").mkdir()
        with remote_of(lab, folder / "s3") as remote:
            figures: dict[str, Any] = {}
            for figures in Campaign.of(lab, remote).figures(arguments.faults, arguments.seed):
                if arguments.write:
                    arguments.write.write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps(figures, indent=1))
    sys.exit(any(figures["problems"].values()))


def tiny_decoder(folder: Path) -> Any:
    from tests.tiny_decoder import write_tiny_decoder

    folder.mkdir()
    return write_tiny_decoder(folder, D)


if __name__ == "__main__":
    main()
