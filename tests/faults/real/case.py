"""One case of the real campaign: the same command again and again, under faults, until it has published.

seed -> faults with stage and delay -> attempts -> checks
"""

import os
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import yaml

from rebeca_ray.catalog.gc import collect
from rebeca_ray.catalog.read import read_catalog
from rebeca_ray.config.jobs import GenerateConfig
from rebeca_ray.config.sections import LimitSettings
from rebeca_ray.storage.leftovers import remove_leftovers
from tests.faults.real.attempt import Night
from tests.faults.real.checks import Reader, fingerprint, lost_and_doubled, without_owner
from tests.faults.real.kinds import (
    DAMAGES,
    DISK_FULL,
    DRIVER_KILLED,
    KILLED_AT_90,
    POISON,
    STAGES,
    STALLED,
    SURVIVED,
    TRITON_KILLED,
    TWO_ATTEMPTS,
    Strike,
    damage,
    fill_disk,
    restart_triton,
)
from tests.faults.real.world import IMAGES_PER_FILE, World

MAX_ATTEMPTS = 6
STALL_MINUTES = 0.75
TYPICAL = {"start": 8.0, "plan": 8.0, "render": 8.0, "assemble": 2.0}  # seconds; the others are short


@dataclass
class Record:
    """One fault that struck, and the outcome of its case."""

    kind: str
    stage: str
    case: int
    ended_with: int | None = None  # exit code of the attempt
    seconds: float | None = None  # until the snapshot was published
    problems: list[str] = field(default_factory=list)
    file: str = ""  # that was damaged, below the catalog


class Case:
    """One night with faults, from a copy of the first night until the second is published."""

    def __init__(self, world: World, number: int, seed: int, kinds: tuple[str, ...], main: str = "") -> None:
        self.world, self.number, self.kinds = world, number, kinds
        self.generator = random.Random(f"{seed}-{number}")
        # Every kind comes once before one comes again.
        self.main = main or random.Random(seed).sample(kinds, len(kinds))[number % len(kinds)]
        self.records: list[Record] = []
        self.problems: list[str] = []
        self.struck_at: list[float] = []
        self.nights: list[Night] = []
        self.redone: int | None = None

    def run(self) -> list[Record]:
        """Run the case; return its records."""
        world = self.world
        self.triton = self.main == TRITON_KILLED
        expected = world.expected_of_triton if self.triton else world.expected
        world.cluster  # noqa: B018 - starts it
        self.root = world.prepare(f"case-{self.number}-{os.getpid()}", on_disk=self.main == DISK_FULL)
        before = read_catalog(self.root)
        self.published_before = before.run_id
        allowed = {fingerprint(before), expected}
        reader = Reader(self.root)
        reader.start()
        published = False
        for attempt in range(MAX_ATTEMPTS):
            code = self.attempt(attempt)
            if code == 0 and self.has_published():
                published = True
                break
        ended_at = time.monotonic()
        reader.stop()
        world.settle()
        self.check(published, expected, allowed, reader)
        for record, struck_at in zip(self.records, self.struck_at, strict=True):
            record.seconds = round(ended_at - struck_at, 1)
            record.problems = self.problems
        if self.problems:
            self.keep_log()
        return self.records

    def has_published(self) -> bool:
        return read_catalog(self.root).run_id != self.published_before

    def pends(self, kind: str) -> bool:
        """Return whether the case is about a kind of fault that has not struck yet."""
        return self.main == kind and all(record.kind != kind for record in self.records)

    def write_config(self) -> Path:
        """Write the config of the next attempt."""
        config: GenerateConfig = self.world.tonight.model_copy(update={"catalog": self.root})
        if self.pends(STALLED):
            limits = LimitSettings(lease_seconds=4, stall_minutes=STALL_MINUTES)
            config = config.model_copy(update={"limits": limits})
        if self.triton:
            if not hasattr(self.world, "triton"):
                self.world.start_triton()
            served = {"backend": "triton", "triton": self.world.triton_settings}
            config = config.model_copy(update={"decoder": config.decoder.model_copy(update=served)})
        path = self.world.folder / ("triton.yaml" if self.triton else "night.yaml")
        values = config.model_dump(mode="json") | {"run_date": config.run_date}
        path.write_text(yaml.safe_dump(values))
        return path

    def attempt(self, number: int) -> int | None:
        """Run one attempt with its faults; return its exit code."""
        if self.main == KILLED_AT_90:  # slowly, so that the writers keep up
            (self.world.orders / "seconds").write_text("3")
        poisoned = self.pends(POISON)
        if poisoned:
            (self.world.orders / "poison").write_text(self.generator.choice(self.world.new_items))
        if self.main == STALLED:
            (self.world.orders / "stalled").unlink(missing_ok=True)
            if self.pends(STALLED):
                (self.world.orders / "stalled").touch()
        config = self.write_config()
        retry = ["--retry-failed"] if self.main == POISON and number and self.codes[-1] == 3 else []
        night = Night(self.world, config, *retry)
        self.nights.append(night)
        began = len(self.records)
        other = None
        if self.main == TWO_ATTEMPTS and number == 0:
            time.sleep(self.generator.choice((0.0, self.generator.uniform(0, 10))))
            other = Night(self.world, config)
            self.note(TWO_ATTEMPTS, "start")
        killed = False
        for stage, delay, kind, strike in self.plan(number):
            if not night.wait_for(stage):
                continue
            time.sleep(delay)
            if night.process.poll() is not None:
                break
            killed = self.strike(night, kind, strike) or killed
        code = night.end()
        (self.world.orders / "poison").unlink(missing_ok=True)
        if code is None:
            self.problems.append("stuck")
        if other is not None:
            self.end_of_other(other, code)
        if poisoned and code == 3:
            self.note(POISON, "render")
        if self.pends(STALLED) and code == 75 and night.stages[-1] == "render":
            self.note(STALLED, "render")
        allowed = {0, 75} | ({3} if poisoned else set()) | ({5} if other else set())
        if not killed:
            self.problems += night.complaints()
            if code is not None and code not in allowed:
                self.problems.append(f"exit code {code}")
        if killed and self.main in DAMAGES and number == 0 and not self.has_published():
            name = damage(self.world, self.root, self.main, self.generator)
            if name:
                self.note(self.main, night.stages[-1], name)
        for record in self.records[began:]:
            record.ended_with = code
        return code

    @property
    def codes(self) -> list[int | None]:
        return [night.process.returncode for night in self.nights]

    def end_of_other(self, other: Night, code: int | None) -> None:
        """Check that one of two attempts was refused with code 5, or found all done."""
        other_code = other.end()
        self.problems += other.complaints()
        if 0 not in (code, other_code) or not {code, other_code} <= {0, 5}:
            self.problems.append(f"two attempts ended with {code} and {other_code}")

    def note(self, kind: str, stage: str, file: str = "") -> None:
        self.records.append(Record(kind, stage, self.number, file=file))
        self.struck_at.append(time.monotonic())

    def strike(self, night: Night, kind: str, strike: Strike | None) -> bool:
        """Let a fault strike now. Return whether it killed the driver."""
        stage = night.stages[-1]
        if kind == KILLED_AT_90:
            self.wait_for_90(night)
        if strike is None:
            night.process.kill()
            if kind in (DRIVER_KILLED, KILLED_AT_90):
                self.note(kind, stage)
            return True
        began = time.monotonic()
        if strike(self.world, self.generator):
            self.records.append(Record(kind, stage, self.number))
            self.struck_at.append(began)
            night.moved_at = time.monotonic()
        return False

    def wait_for_90(self, night: Night) -> None:
        """Wait until nine tenths of the items are drawn."""
        total = len(self.world.new_items)
        while night.process.poll() is None and len(set(self.world.drawn())) < 0.9 * total:
            time.sleep(0.05)

    def plan(self, attempt: int) -> Iterator[tuple[str, float, str, Strike | None]]:
        """Yield the faults of an attempt in order: stage, delay, kind, strike (None kills the driver)."""
        faults: list[tuple[str, float, str, Strike | None]] = []
        survivable = [kind for kind in self.kinds if kind in SURVIVED]
        if attempt == 0:
            faults += self.main_faults()
        # Every kind alone would cost a night each, so most nights meet several.
        if survivable and attempt < 2 and not self.triton and self.main not in (STALLED, POISON):
            for _ in range(self.generator.randint(3, 6)):
                kind = self.generator.choice(survivable)
                faults.append(self.moment(kind, *SURVIVED[kind]))
        yield from sorted(faults, key=lambda fault: (STAGES.index(fault[0]), fault[1]))

    def main_faults(self) -> list[tuple[str, float, str, Strike | None]]:
        if self.main in SURVIVED:
            return [self.moment(self.main, *SURVIVED[self.main])]
        if self.main == DISK_FULL:
            return [self.moment(DISK_FULL, ("start", "plan", "render", "assemble"), fill_disk)]
        if self.main == TRITON_KILLED:
            return [self.moment(TRITON_KILLED, ("render",), restart_triton)]
        if self.main == KILLED_AT_90:
            return [("render", 0.0, KILLED_AT_90, None)]
        if self.main == DRIVER_KILLED:
            return [self.moment(DRIVER_KILLED, STAGES, None)]
        if self.main in DAMAGES:
            return [self.moment(self.main, ("plan", "test", "render", "assemble"), None)]
        return []

    def moment(
        self, kind: str, stages: tuple[str, ...], strike: Strike | None
    ) -> tuple[str, float, str, Strike | None]:
        stage = self.generator.choice(stages)
        return stage, self.generator.uniform(0, TYPICAL.get(stage, 0.2)), kind, strike

    def check(self, published: bool, expected: str, allowed: set[str], reader: Reader) -> None:
        """Note every difference between the case and an undisturbed night."""
        if not published:
            self.problems.append(f"never published, exit codes {self.codes}")
        snapshot = read_catalog(self.root)
        lost, doubled = lost_and_doubled(snapshot)
        if lost or doubled:
            self.problems.append(f"lost {lost}, doubled {doubled}")
        if published and fingerprint(snapshot) != expected:
            self.problems.append("differs from the undisturbed run")
        if reader.errors or not set(reader.hashes.values()) <= allowed:
            self.problems.append(f"half-seen {reader.errors[:2]}")
        drawn = self.world.drawn()
        self.redone = len(drawn) - len(set(drawn))
        if self.main == KILLED_AT_90 and self.redone > 0.1 * len(set(drawn)) + IMAGES_PER_FILE:
            self.problems.append(f"redone {self.redone} of {len(set(drawn))}")
        for _ in range(2):
            remove_leftovers(self.root, datetime.now(UTC))
            collect(self.root, keep=1, grace_hours=0)
        if left := without_owner(self.root):
            self.problems.append(f"left {left[:3]}")

    def keep_log(self) -> None:
        lines = [line for night in self.nights for line in [*night.lines, f"-- {night.process.returncode}"]]
        path = Path(f"/tmp/real_fault_{os.getpid()}_{self.number}.log")
        path.write_text("\n".join([f"{self.main} {self.problems}", *lines]))
