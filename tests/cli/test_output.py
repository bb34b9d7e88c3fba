"""How results look: units for people, plain numbers for JSON."""

import json

import pytest
from rich.console import Console, RenderableType

from rebeca_ray.catalog.gc import Garbage
from rebeca_ray.catalog.layout import Run
from rebeca_ray.catalog.manifest import Cost, Counts, FileList, GateOutcome, Manifest
from rebeca_ray.catalog.pointer import Pointer
from rebeca_ray.cli import output
from rebeca_ray.generation.pipeline import Generated
from tests.conftest import synthetic_manifest

FORECAST = Cost(
    requested_items=48000,
    planned_users=1200,
    images=3600,
    plan_seconds=72.0,
    render_seconds=7200.0,
    other_seconds=9.5,
    hours=2.0226,
    gpu_hours=2.0,
    cpu_hours=0.5,
    bytes_written=3_300_000,
    requests=7300,
    cost=5.5,
)


def test_a_published_run_shows_its_rate_and_size_once_it_rendered() -> None:
    run = Run(root="catalog", run_date="2026-03-02", run_id="a-run", fencing_token=1)
    files = FileList(path="files-1.parquet", rows=3, bytes=1, sha256="")
    manifest = synthetic_manifest(run, files, actual=FORECAST, bytes=5_000_000, bytes_written=3_300_000)
    shown = output.published(Generated(manifest=manifest, seconds={"render": 7200.0}), "catalog").splitlines()
    assert shown[1].endswith("; render 2.0 h")
    assert shown[2] == "images: 3,600 rendered at 0.5 per second, 2.0 h of GPUs; 3.3 MB written of 5.0 MB"
    assert len(output.published(Generated(manifest=manifest, seconds={}), "catalog").splitlines()) == 2


def lines(renderable: RenderableType) -> list[str]:
    console = Console(width=120, soft_wrap=True)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get().splitlines()


def cells(renderable: RenderableType) -> dict[str, list[str]]:
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines(renderable) if "│" in line]
    return {row[0]: row[1:] for row in rows}


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (59.94, "59.9 s"), (72, "1.2 min"), (3600, "1.0 h"), (1e7, "2,777.8 h")],
)
def test_durations_have_a_unit(seconds: float, text: str) -> None:
    assert output.duration(seconds) == text


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (3_300_000, "3.3 MB"),
        (2e9, "2.0 GB"),
        (5e15, "5,000.0 TB"),
    ],
)
def test_sizes_have_a_unit(num_bytes: float, text: str) -> None:
    assert output.size(num_bytes) == text


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("render_seconds", 72.0, "1.2 min"),
        ("gpu_hours", 0.02, "1.2 min"),
        ("bytes_written", 3_300_000, "3.3 MB"),
        ("cost", 1234.5, "1,234.50"),
        ("new", 12345, "12,345"),
        ("diversity", 0.7355, "0.7355"),
        ("like_probability", None, ""),
        ("code", "0.1.0", "0.1.0"),
        ("forced", True, "True"),
    ],
)
def test_the_name_of_a_figure_tells_its_unit(name: str, value: object, text: str) -> None:
    assert output.figure(name, value) == text


def test_an_estimate_is_shown_beside_the_last_run() -> None:
    last = FORECAST.model_copy(update={"images": 1800, "render_seconds": 3600.0, "bytes_written": 900})
    rows = cells(output.estimate_table(FORECAST, last))
    assert rows["images to render"] == ["3,600", "1,800"]
    assert rows["time to render"] == ["2.0 h", "1.0 h"]
    assert rows["GPU time"] == ["2.0 h", "2.0 h"]
    assert rows["data written"] == ["3.3 MB", "900 B"]
    assert rows["cost, in the currency of `prices`"] == ["5.50", "5.50"]
    assert cells(output.estimate_table(FORECAST, None))["images to render"] == ["3,600", ""]


def test_the_json_of_an_estimate_has_plain_numbers() -> None:
    forecast = json.loads(json.dumps(output.estimate_json(FORECAST, None)))
    assert forecast["last_run"] is None
    assert forecast["tonight"]["bytes_written"] == 3_300_000
    assert forecast["tonight"]["render_seconds"] == 7200.0
    assert set(forecast["tonight"]) == set(output.ESTIMATE_LABELS)


def manifest(run_id: str, *, refused: list[str]) -> Manifest:
    counts = {
        **dict.fromkeys(Counts.model_fields, 0),
        "new": 1000,
        "carried": 200,
        "population": 34,
        "users": 400,
    }
    return synthetic_manifest(
        Run(root="c", run_date="2026-03-02", run_id=run_id, fencing_token=1),
        FileList(path="files.parquet", rows=0, bytes=0, sha256=""),
        counts=Counts(**counts),
        gate=GateOutcome(refused=refused),
    )


def test_a_list_tells_published_refused_and_running() -> None:
    lease = {"run_id": "later", "fencing_token": 4, "holder": "", "beat": 1, "seconds": 60.0}
    pointer = Pointer(run_id="second", lease=lease)  # type: ignore[arg-type]
    snapshots = [manifest("first", refused=["too few users"]), manifest("second", refused=[])]
    listed = lines(output.snapshot_list(pointer, snapshots))
    assert listed[3].split("│")[2:6] == [" first  ", " 1,234 ", " 1,000 ", " refused by the quality gate "]
    assert listed[4].split("│")[2].strip() == "second"
    assert "published" in listed[4]
    assert listed[-1] == "in progress: run later (fencing token 4)"
    assert [row["status"] for row in output.snapshot_list_json(pointer, snapshots)["snapshots"]] == [
        "refused",
        "published",
    ]


def test_a_list_without_a_published_snapshot_gives_the_command() -> None:
    text = lines(output.snapshot_list(Pointer(), [manifest("first", refused=[])]))[-1]
    assert text == "no snapshot is published: `rebeca catalog publish --run-id ID` publishes one"


def test_a_dry_collection_lists_each_path() -> None:
    garbage = Garbage(
        manifests=["a/manifest.json"],
        work=["b"],
        files=[],
        folders=[],
        records=[],
        kept=["c", "d"],
        runs=["a", "b"],
    )
    summary = "1 snapshots, the work of 1 dead runs and 0 files; kept 2 snapshots"
    assert output.collected(garbage) == f"removed {summary}"
    assert output.collected(garbage, dry_run=True).split("\n") == [
        "a/manifest.json",
        "b",
        f"would remove {summary}",
    ]


def test_a_night_with_nothing_due_says_so() -> None:
    assert output.nightly([], None, "c") == "c: a snapshot of this date is published; nothing to do"
