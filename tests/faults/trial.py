"""One fault: a command that fails, the same command again, and everything that must hold afterwards."""

import io
import os
import re
import time
import traceback
from collections import Counter as Counted
from contextlib import AbstractContextManager, redirect_stderr
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from rebeca_ray.catalog.exports.iceberg_orphans import UUID
from rebeca_ray.catalog.gc import collect
from rebeca_ray.catalog.pointer import read_pointer
from rebeca_ray.catalog.read import open_snapshot, read_catalog
from rebeca_ray.catalog.snapshots import list_snapshots, roll_back
from rebeca_ray.cli.runner import plain_errors
from rebeca_ray.errors import UserError
from rebeca_ray.storage.filesystem import list_files
from tests.faults.commands import CATALOG, Command
from tests.faults.disk import KILLED, Counter, Killed, Operation, watched
from tests.faults.reader import NOTHING, Reader, View, rows_of
from tests.faults.world import BLOCK, Lab, World, in_this_process

TRACEBACK, INTERRUPTED = 1, (130, 143)  # exit codes


@dataclass(frozen=True)
class Ended:
    """The end of an attempt: its exit code, and everything on standard error."""

    code: int
    text: str
    seconds: float


@dataclass(frozen=True)
class Twin:
    """An undisturbed run of a command: its operations, its views before and after, its files in the end."""

    operations: list[Operation]
    views: dict[View, set[str]]
    after: dict[View, str]
    rows: list[str]
    files: list[str]
    seeds: list[int]  # of the rows that were drawn


@dataclass
class Trial:
    """The result of one fault. `problems` are texts by kind: lost, doubled, half seen, stuck, left, exit."""

    command: str
    kind: str
    at: int
    happened: bool = False
    code: int = 0
    seconds_to_recover: float = 0.0
    redone: float | None = None  # share of all rows, after a kill past 90% of them
    problems: dict[str, list[str]] = field(default_factory=dict)

    def note(self, kind: str, text: str) -> None:
        self.problems.setdefault(kind, []).append(text)


class Fault(Protocol):
    """Something that disturbs the first attempt of a command. It has a kind, and happens at an operation."""

    kind: str
    at: int
    happened: bool
    stall_minutes: float | None
    recovers: bool  # by the same command again; otherwise `between` did all that was needed

    @property
    def codes(self) -> tuple[int, ...]:
        """Return the exit codes that the attempt may end with, besides 0."""
        ...

    def around(
        self, lab: Lab, command: Command, world: World, reader: Reader
    ) -> AbstractContextManager[None]:
        """Disturb the command that runs in the block."""
        ...

    def between(self, world: World) -> None:
        """Disturb what the first attempt left."""
        ...


def attempt(command: Command, world: World) -> Ended:
    """Run a command as the command line does."""
    began, text = time.perf_counter(), io.StringIO()
    code = 0
    try:
        with redirect_stderr(text), plain_errors():
            command.run(world)
    except Killed:
        code = KILLED
    except SystemExit as error:
        code = int(str(error.code))
        if code in INTERRUPTED:
            raise
    except Exception:
        code = TRACEBACK
        text.write(traceback.format_exc())
    return Ended(code, text.getvalue(), time.perf_counter() - began)


def undisturbed(lab: Lab, command: Command, refused: int | None = None) -> Twin:
    """Run a command without a fault; return all that a disturbed one is compared with.

    The row with the seed `refused` has an error instead of an image.
    """
    world = lab.fresh(command.state)
    views = (CATALOG, *command.views)
    before = {view: view.digest(world) if is_there(view, world) else NOTHING for view in views}
    counter, start = Counter(), len(lab.drawn.seeds)
    lab.drawn.refused = frozenset([refused] if refused is not None else [])
    with in_this_process(lab.drawn):
        with watched(world.root, counter):
            ended = attempt(command, world)
        lab.drawn.refused = frozenset()
        assert ended.code == 0, ended.text
        after = {view: view.digest(world) for view in views}
        rows = rows_of(read_catalog(world.catalog))
        files = files_in_the_end(command, world)
    return Twin(
        operations=counter.operations,
        views={view: {before[view], after[view]} for view in views},
        after=after,
        rows=rows,
        files=files,
        seeds=lab.drawn.seeds[start:],
    )


def is_there(view: View, world: World) -> bool:
    return view.name == "iceberg" or view.stamp(world) is not None


def run_trial(lab: Lab, command: Command, fault: Fault, twin: Twin) -> Trial:
    """Disturb a command once, run it again, and check everything."""
    world = replace(lab.fresh(command.state), stall_minutes=fault.stall_minutes)
    trial = Trial(command=command.name, kind=fault.kind, at=fault.at)
    reader = Reader(world, twin.views)
    with in_this_process(lab.drawn):
        lab.drawn.rows = 0
        published = read_pointer(world.catalog)[0].run_id
        with fault.around(lab, command, world, reader):
            first = attempt(command, world)
        trial.code, drawn = first.code, lab.drawn.rows
        check_end(trial, first, fault)
        reader.look()
        fault.between(world)
        trial.happened = fault.happened
        seen = command.once and has_taken_effect(world, command, twin, published)
        if fault.recovers and not seen:
            lab.drawn.rows = 0
            again = attempt(command, replace(world, stall_minutes=None))  # a busy machine may take its time
            trial.seconds_to_recover = again.seconds
            check_redone(trial, twin, drawn, lab.drawn.rows)
            if again.code != 0:
                trial.note("stuck", f"the repeat ended with {again.code}: {again.text[-600:]}")
                return trial
        reader.look()
        for text in reader.half_seen:
            trial.note("half seen", text)
        compare(trial, world, twin)
        if not trial.problems:
            check_files(trial, command, world, twin)
    return trial


def check_end(trial: Trial, first: Ended, fault: Fault) -> None:
    """Note an attempt that ended with the wrong exit code, or with more or less than one line."""
    if first.code == KILLED:
        if KILLED not in fault.codes:
            trial.note("exit", "nothing killed it")
        return
    lines = first.text.strip().splitlines()
    if first.code not in fault.codes and first.code != 0:
        trial.note("exit", f"code {first.code}: {first.text[-1500:]}")
    elif len(lines) != (first.code != 0):
        trial.note("exit", f"{len(lines)} lines: {first.text[-600:]}")


def check_redone(trial: Trial, twin: Twin, before: int, again: int) -> None:
    """Note a kill past 90% of the rows that costs more than 10% of them and one block."""
    rows = len(twin.seeds)
    if not rows or before < 0.9 * rows or not trial.kind.startswith("killed"):
        return
    redone = before + again - rows
    trial.redone = round(redone / rows, 3)
    if redone > 0.1 * rows + BLOCK:
        trial.note("redone", f"{redone} of {rows} rows")


def has_taken_effect(world: World, command: Command, twin: Twin, published: str | None) -> bool:
    """Return whether the first attempt did its work: an operator looks before repeating it."""
    if command.views:
        view = command.views[0]
        return view.stamp(world) is not None and view.digest(world) == twin.after[view]
    return read_pointer(world.catalog)[0].run_id != published


def compare(trial: Trial, world: World, twin: Twin) -> None:
    """Note rows that are lost or doubled, and views that differ from those of the undisturbed run."""
    for view, expected in twin.after.items():
        try:
            digest = view.digest(world)
        except Exception as error:  # of any kind
            trial.note("lost", f"{view.name}: {type(error).__name__}: {error}")
            continue
        if digest == expected:
            continue
        if view is not CATALOG:
            trial.note("lost", f"{view.name}: is not as after an undisturbed run")
            continue
        rows = rows_of(read_catalog(world.catalog))
        lost, doubled = Counted(twin.rows) - Counted(rows), Counted(rows) - Counted(twin.rows)
        for kind, difference in (("lost", lost), ("doubled", doubled)):
            if difference:
                trial.note(kind, f"{sum(difference.values())} rows, such as {next(iter(difference))[:600]}")


def check_files(trial: Trial, command: Command, world: World, twin: Twin) -> None:
    """Note files that garbage collection and the next export do not remove."""
    try:
        files = files_in_the_end(command, world)
    except UserError as error:
        trial.note("left", str(error))
        return
    extra, missing = Counted(files) - Counted(twin.files), Counted(twin.files) - Counted(files)
    for kind, difference in (("left", extra), ("lost", missing)):
        if difference:
            trial.note(kind, f"{difference.total()} files: {sorted(difference)[:3]}")


def files_in_the_end(command: Command, world: World) -> list[str]:
    """Let the next export and garbage collection clean up; return the files that remain, by what they are.

    All files are first made so old that their writers do not return.
    """
    for file in Path(world.root).rglob("*"):  # on a server there are none
        os.utime(file, (0, 0))
    if command.views:
        roll_back(world.catalog)  # the next export has another snapshot
        Path(world.out("atlas.parquet")).unlink(missing_ok=True)  # which an export never replaces
        command.run(world)
    for _ in range(2):
        collect(world.catalog, keep=1, grace_hours=0)
    # A probe on a server cannot be made an hour old.
    files = [f"catalog: {path}" for path in unexplained(world.catalog) if not path.startswith(".swap-probe-")]
    files += [f"snapshots: {len(list_snapshots(world.catalog))}"]
    outside = [uri.removeprefix(world.root) for uri in list_files(world.root)]
    others = ["/catalog/", *([] if command.name == "export iceberg" else ["/warehouse/", "/iceberg.db"])]
    exported = [path for path in outside if not path.startswith(tuple(others)) and not path.endswith(".lock")]
    exported = [path for path in exported if "/.swap-probe-" not in path]
    # Each attempt has a token, and several complete exports of one run may stay.
    files += {re.sub(r"token=\d+", "token=_", path) for path in exported if "token=" in path}
    # Names of Iceberg's metadata are random.
    files += [re.sub(rf"{UUID}|snap-\d+", "_", path) for path in exported if "token=" not in path]
    return files


def unexplained(root: str) -> list[str]:
    """Return the files of a catalog that no snapshot and no record of it names."""
    named = {"latest.json", ".latest.lock"}
    for manifest in list_snapshots(root):
        named |= {f"{manifest.path}/{name}" for name in ("manifest.json", ".manifest.lock")}
        named |= {manifest.files.path, f"runs/{manifest.run_id}.json"}
        named |= set(open_snapshot(root, manifest.path).files["path"].to_pylist())
    made_images = {name.split("/")[1].removeprefix("run_id=") for name in named if name.startswith("images/")}
    made_tables = {name.split("/")[2].removeprefix("run_id=") for name in named if "/bucket=" in name}
    named |= {f"runs/{run_id}.json" for run_id in made_images | made_tables}
    files = [uri.removeprefix(f"{root}/") for uri in list_files(root)]
    return sorted(path for path in files if path not in named and not path.startswith("reports/"))
