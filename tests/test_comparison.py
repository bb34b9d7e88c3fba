"""The page that compares: its figures are those of the measurement, and each source in a cell is listed."""

import json
import re

from tests.conftest import REPO

PAGE = REPO / "infra" / "docs" / "comparison.md"
RESULTS = REPO / "tests" / "bench" / "results" / "comparison.json"


def test_the_measured_table_shows_the_figures_of_the_measurement() -> None:
    measured = json.loads(RESULTS.read_text())
    speed, wrong, broken = (measured[name] for name in ("images_per_cpu_second", "wrong_rows", "broken_row"))
    rows, killed, jobs = (
        measured[name] for name in ("rows", "after_a_kill", "images_per_second_of_whole_jobs")
    )
    script, ours = killed["script"], killed["rebeca"]
    assert broken["script_says"] == "nothing"
    expected = [
        [f"images per second of processor time, batches of {rows}"]
        + [str(speed[name]) for name in ("script, batches", "rebeca, batches")],
        ["the same, one row at a time", str(speed["script, one row at a time"]), "–"],
        [
            "images per second of a whole job, one row at a time, as the right images need",
            str(jobs["script, one row at a time"]),
            "–",
        ],
        [
            f"the same, batches of {rows}, float32",
            f"{jobs['script, batches']}, all wrong",
            str(jobs["rebeca, float32"]),
        ],
        [
            f"the same, batches of {rows}, as it comes: `dtype: auto`, here bfloat16",
            "–",
            str(jobs["rebeca, dtype auto"]),
        ],
        [
            f"the same, the loop with `accelerate`, batches of {rows}, float32",
            f"{jobs['accelerate, batches']}, all wrong",
            "",
        ],
        ["images of a batch that differ from the row drawn alone"]
        + [f"{wrong[name]} of {rows}" for name in ("script", "rebeca")],
        [
            "a row without numbers in its embedding",
            "no error",
            f"an error in its row, `{broken['rebeca_says']}`",
        ],
        [f"rows after SIGKILL and the same command again, of {killed['expected']}"]
        + [str(part["rows"]) for part in (script, ours)],
        ["repeated rows among them", *(str(part["repeated"]) for part in (script, ours))],
        [
            "lines of code",
            str(measured["lines_of_code"]["script"]),
            f"0, and a config; the package has {measured['lines_of_code']['rebeca_ray']:,}",
        ],
    ]
    section = PAGE.read_text().split("\n## Measured\n")[1].split("\n## ")[0]
    table = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in section.splitlines()
        if line.startswith("|")
    ]
    assert table[2:] == expected
    right, fast = jobs["script, one row at a time"], jobs["script, batches"]
    for name in ("rebeca, float32", "rebeca, dtype auto"):
        assert f"{jobs[name] / right:.1f} times" in section
        assert f"{jobs[name] / fast:.2f} times" in section
    assert f"Device: {measured['device']}." in section
    assert (script["missing"], ours["missing"], ours["repeated"]) == (0, 0, 0)


def test_each_source_of_a_cell_is_listed_and_used() -> None:
    text, _, sources = PAGE.read_text().partition("\n## Sources\n")
    used = {name for group in re.findall(r"\[([A-Z]\d(?:, [A-Z]\d)*)\]", text) for name in group.split(", ")}
    assert used == set(re.findall(r"^\| ([A-Z]\d) \|", sources, re.MULTILINE))
