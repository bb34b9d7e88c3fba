"""Two commands at once in two threads, of which exactly one runs at a time.

Before each storage operation a seeded choice gives the baton to the other thread or keeps it, so that a seed
always makes the same interleaving. A thread that waits for a lock or a lease gives the baton away too.

Readers of Parquet files are Arrow's and give no baton away inside a file.

`python -m tests.faults.interleaving --number 500 --seed 1`
"""

import argparse
import json
import logging
import os
import random
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from rebeca_ray.catalog import lease
from rebeca_ray.catalog.gc import collect
from rebeca_ray.catalog.read import open_snapshot, read_catalog
from rebeca_ray.catalog.snapshots import list_snapshots
from rebeca_ray.storage import local
from rebeca_ray.storage.failures import user_error
from tests.faults.campaign import tiny_decoder
from tests.faults.commands import CATALOG, COMMANDS, generate
from tests.faults.disk import Operation, watched
from tests.faults.reader import Reader, rows_of
from tests.faults.rivals import Beats
from tests.faults.trial import unexplained
from tests.faults.world import Lab, World, in_this_process

DOCUMENTED = (0, 2, 4, 5, 75)  # done, refused input, a missing file, a rival, start again
READS = 10  # as many operations as a collection has
Work = Callable[[World], object]


class Baton:
    """Lets one of two threads run. Others, such as those of leases, are left alone."""

    def __init__(self, seed: int, look: Callable[[], None]) -> None:
        self.generator, self.look = random.Random(seed), look
        self.condition = threading.Condition()
        self.names = [0, 0]  # of threads, once they have begun
        self.holder = 0
        self.ended = [False, False]
        self.looking = False
        self.handovers = self.operations = 0
        # Some seeds hand over often, others seldom.
        self.share = self.generator.choice([0.02, 0.1, 0.3, 0.5])

    def run(self, index: int, work: Callable[[], None]) -> None:
        """Do the work of one of the two threads, as soon as it has the baton."""
        with self.condition:
            self.names[index] = threading.get_ident()
            self.condition.notify_all()
            self.condition.wait_for(lambda: all(self.names) and self.holder == index)
        try:
            work()
        finally:
            with self.condition:
                self.ended[index] = True
                self.holder = 1 - index
                self.condition.notify_all()

    def hand_over(self) -> None:
        """Give the baton to the other thread, and return when it is back."""
        if self.looking or threading.get_ident() not in self.names:
            return
        with self.condition:
            index = self.names.index(threading.get_ident())
            if self.ended[1 - index]:
                return
            self.handovers += 1
            self.holder = 1 - index
            self.condition.notify_all()
            assert self.condition.wait_for(lambda: self.holder == index, 120), "the other thread hangs"

    def before(self, operation: Operation) -> None:
        if self.looking or threading.get_ident() not in self.names:
            return
        self.operations += 1
        if self.generator.random() < self.share:
            self.hand_over()

    def after(self, operation: Operation) -> None:
        if operation.is_change and not self.looking and threading.get_ident() in self.names:
            self.looking = True
            self.look()
            self.looking = False

    def tear(self, operation: Operation) -> None:
        return None


@dataclass
class Pair:
    """Two commands that run at once, and the state in which they begin."""

    name: str
    state: str
    first: Work
    second: Work


@dataclass
class Interleaving:
    """The ends of both commands, and everything that must not be."""

    pair: str
    seed: int
    codes: tuple[int, ...] = ()
    operations: int = 0
    handovers: int = 0
    problems: list[str] = field(default_factory=list)


def command(name: str) -> Work:
    return next(command.run for command in COMMANDS if command.name == name)


def read_oldest(world: World) -> None:
    """Read all of the oldest snapshot again and again. Garbage collection may remove it meanwhile."""
    snapshot = open_snapshot(world.catalog, list_snapshots(world.catalog)[0].path)
    assert len({tuple(rows_of(snapshot)) for _ in range(READS)}) == 1


def read_published(world: World) -> None:
    rows_of(read_catalog(world.catalog))


def collect_all(world: World) -> None:
    collect(world.catalog, keep=1, grace_hours=0)


PAIRS = (
    Pair("two nights", "two nights", command("night"), command("night")),
    Pair("two nights", "three nights", lambda world: generate(world, 2), lambda world: generate(world, 3)),
    Pair("night, gc", "a run given up", lambda world: generate(world, 3), collect_all),
    Pair("night, gc", "three nights", lambda world: generate(world, 3), collect_all),
    Pair("publish, gc", "three nights", command("publish"), collect_all),
    Pair("publish, gc", "a run given up", command("publish"), collect_all),
    Pair("rollback, night", "three nights", command("rollback"), lambda world: generate(world, 3)),
    Pair("rollback, night", "two nights", command("rollback"), command("night")),
    *(
        Pair("export, gc", "a run given up", command(f"export {name}"), collect_all)
        for name in ("images", "values", "changes", "atlas", "iceberg")
    ),
    Pair("reader, gc", "three nights", read_oldest, collect_all),
    Pair("reader, gc", "a run given up", read_published, collect_all),
)


def end_of(work: Work, world: World) -> tuple[int, str]:
    """Return the exit code of a command, and its line. Standard error belongs to both threads."""
    try:
        work(world)
    except Exception as error:  # of any kind: that is the question
        reason = user_error(error)
        return (reason.exit_code, str(reason)) if reason else (1, traceback.format_exc())
    return 0, ""


def serial_digests(lab: Lab, pair: Pair) -> set[str]:
    """Return the hashes of the catalog before, between and after the two commands, in both orders."""
    digests = set()
    for order in ((pair.first, pair.second), (pair.second, pair.first)):
        world = lab.fresh(pair.state)
        digests.add(CATALOG.digest(world))
        with in_this_process(lab.drawn):
            for work in order:
                end_of(work, world)
                digests.add(CATALOG.digest(world))
    return digests


@contextmanager
def handing_over(baton: Baton, *, silent: bool) -> Iterator[None]:
    """Give the baton away while a thread sleeps: it waits for a lock, or for the silence of a lease."""
    with Beats().heard(silent=silent):
        wait = lease.time.sleep

        def sleep(seconds: float) -> None:
            wait(seconds)
            baton.hand_over()

        waiting = SimpleNamespace(monotonic=time.monotonic, sleep=lambda _: baton.hand_over())
        with patch.object(lease.time, "sleep", sleep), patch.object(local, "time", waiting):
            yield


def interleave(lab: Lab, pair: Pair, seed: int, digests: set[str]) -> Interleaving:
    """Run a pair of commands with the handovers of a seed, and check everything."""
    world = lab.fresh(pair.state)
    reader = Reader(world, {CATALOG: digests})
    baton = Baton(seed, reader.look)
    ends = [(0, ""), (0, "")]

    def run(index: int, work: Work) -> None:
        def note() -> None:
            ends[index] = end_of(work, world)

        baton.run(index, note)

    with (
        in_this_process(lab.drawn),
        handing_over(baton, silent=random.Random(seed).random() < 0.3),
        watched(world.root, baton),
    ):
        threads = [threading.Thread(target=run, args=pair) for pair in enumerate((pair.first, pair.second))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    made = Interleaving(pair.name, seed, tuple(code for code, _ in ends), baton.operations, baton.handovers)
    made.problems = [f"code {code}: {line}" for code, line in ends if code not in DOCUMENTED or "\n" in line]
    made.problems += reader.half_seen
    if all(code not in (0, 5, 75) for code in made.codes):
        made.problems.append(f"both are refused: {ends}")
    with in_this_process(lab.drawn):
        made.problems += problems_in_the_end(world, digests)
    return made


def problems_in_the_end(world: World, digests: set[str]) -> list[str]:
    """Return the defects of the published snapshot, and files that garbage collection leaves."""
    if CATALOG.digest(world) not in digests:
        return ["the published snapshot is that of no order of the two"]
    for _ in range(2):
        collect_all(world)
    left = unexplained(world.catalog)
    return [f"{len(left)} files are left: {left[:3]}"] if left else []


def summary(made: list[Interleaving]) -> dict[str, Any]:
    return {
        "interleavings": len(made),
        "by_pair": dict(Counter(one.pair for one in made)),
        "exit_codes": {
            pair: dict(Counter(" ".join(map(str, one.codes)) for one in made if one.pair == pair))
            for pair in dict.fromkeys(one.pair for one in made)
        },
        "handovers": sum(one.handovers for one in made),
        "operations": sum(one.operations for one in made),
        "problems": sum(bool(one.problems) for one in made),
    }


def interleavings(lab: Lab, number: int, seed: int) -> Iterator[Interleaving]:
    """Yield the interleavings of a seed, the pairs in turn."""
    digests: dict[int, set[str]] = {}
    for index in range(number):
        kind = index % len(PAIRS)
        digests[kind] = digests.get(kind) or serial_digests(lab, PAIRS[kind])
        yield interleave(lab, PAIRS[kind], seed * 100_000 + index, digests[kind])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--number", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--write", type=Path, help="JSON file for the figures")
    arguments = parser.parse_args()
    os.fsync = lambda _: None  # as in the tests
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory(prefix="interleavings") as name:
        lab = Lab(Path(name) / "lab", tiny_decoder(Path(name) / "decoder"))
        cpu, made = time.process_time(), []
        for one in interleavings(lab, arguments.number, arguments.seed):
            made.append(one)
            for problem in one.problems:
                print(f"{one.pair}, seed {one.seed}: {problem}")
        seconds = round(time.process_time() - cpu)
    figures = {**summary(made), "seed": arguments.seed, "cpu_seconds": seconds}
    print(json.dumps(figures, indent=1))
    if arguments.write:
        arguments.write.write_text(json.dumps(figures, indent=1) + "\n")
    sys.exit(bool(figures["problems"]))


if __name__ == "__main__":
    main()
