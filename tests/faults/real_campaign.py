"""The real campaign: nights under faults of real processes and servers, repeated until they are published.

`python -m tests.faults.real_campaign --faults 100 --seed 0 [--kinds KIND …]` prints a table and merges its
records into tests/bench/results/real_faults.json.
"""

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from tests.conftest import REPO
from tests.faults.real.case import Case, Record
from tests.faults.real.kinds import ALL_KINDS
from tests.faults.real.world import real_world

RESULTS = REPO / "tests" / "bench" / "results" / "real_faults.json"


def table(records: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the figures by kind, and of all."""

    def figures(rows: list[dict[str, Any]]) -> dict[str, Any]:
        texts = [" ".join(row["problems"]) for row in rows]
        seconds = [row["seconds"] for row in rows if row["seconds"] is not None]
        return {
            "faults": len(rows),
            **{
                name: sum(mark in text for text in texts)
                for name, mark in (
                    ("lost", "lost"),
                    ("doubled", "doubled"),
                    ("different", "differs"),
                    ("half_seen", "half-seen"),
                    ("stuck", "stuck"),
                    ("left", "left"),
                    ("badly_ended", "code"),
                )
            },
            "seconds_median": median(seconds) if seconds else None,
            "seconds_max": max(seconds, default=None),
        }

    kinds = [kind for kind in ALL_KINDS if any(row["kind"] == kind for row in records)]
    return {kind: figures([row for row in records if row["kind"] == kind]) for kind in kinds} | {
        "all": figures(records)
    }


def merge(path: Path, records: list[Record]) -> dict[str, Any]:
    """Add records to the file of results; return its content."""
    before = json.loads(path.read_text())["records"] if path.exists() else []
    rows = before + [asdict(record) for record in records]
    content = {"by_kind": table(rows), "records": rows}
    text = json.dumps(content["by_kind"], indent=1)
    lines = ",\n  ".join(json.dumps(row) for row in rows)
    path.write_text(f'{{"by_kind": {text},\n "records": [\n  {lines}\n ]}}\n')
    return content


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--faults", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=ALL_KINDS, default=ALL_KINDS)
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no case after this time")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    until, done, number = time.monotonic() + 60 * arguments.minutes, 0, 0
    with real_world() as world:
        while done < arguments.faults and time.monotonic() < until:
            case = Case(world, number, arguments.seed, tuple(arguments.kinds))
            began = time.monotonic()
            records = case.run()
            number, done = number + 1, done + len(records)
            struck = ", ".join(f"{record.kind} ({record.stage})" for record in records)
            seconds = time.monotonic() - began
            print(f"{done:4} case {case.number} {seconds:.0f} s: {struck}; codes {case.codes}", flush=True)
            print(f"     redone {case.redone}; {case.problems or 'ok'}", flush=True)
            merge(arguments.out, records)
    print(json.dumps(json.loads(arguments.out.read_text())["by_kind"], indent=1))


if __name__ == "__main__":
    main()
