"""`rebeca data`: the commands of the documentation run on small trees, and failures have exit codes."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rebeca_ray.cli.commands import app
from tests.conftest import REPO
from tests.data.published.trees import (
    images_of,
    rows_of,
    write_flickr,
    write_images,
    write_lapis,
    write_pairs,
    write_pamela,
)
from tests.test_docs import block_commands

REBECA = str(Path(sys.executable).parent / "rebeca")
DATA_PAGE = REPO / "infra" / "docs" / "data.md"
COMMANDS = [
    command
    for command in block_commands(DATA_PAGE)
    if command.startswith("rebeca data ") or "embed_openclip" in command
]
RATINGS = {  # of the command's output folder: training, validation and test
    "flickr": (3, 0, 0),
    "pamela": (2, 2, 2),
    "lapis": (1, 1, 1),
    "pickapic": (3, 2, 2),
    "likes": (2, 0, 0),
    "rated": (1, 0, 0),
}


@pytest.fixture
def trees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write every source that the documentation names, and work beside them."""
    monkeypatch.chdir(tmp_path)
    write_flickr(tmp_path / "FLICKR-AES")
    write_pamela(tmp_path / "PAMELA")
    write_lapis(tmp_path / "LAPIS")
    write_pairs(tmp_path / "pickapic_v1")
    write_images(tmp_path / "people", ["ann/likes/1.jpg", "ben/dislikes/2.jpg"])
    write_images(tmp_path / "photos", ["1.jpg"])
    (tmp_path / "ratings.csv").write_text("rater,photo,stars\nann,1,5\n")
    (tmp_path / "jobs").symlink_to(REPO / "jobs")
    return tmp_path


def run(command: str) -> tuple[int, str]:
    """Run a command in this process; return its exit code and its output."""
    result = CliRunner().invoke(app, shlex.split(command)[1:])
    return result.exit_code, result.output


def test_the_documentation_shows_every_command(trees: Path) -> None:
    group = next(one for one in app.registered_groups if one.name == "data").typer_instance
    assert group is not None
    names = {
        command.name or command.callback.__name__ for command in group.registered_commands if command.callback
    }
    assert {command.split()[2] for command in COMMANDS if " data " in command} == names


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_of_the_documentation_runs(trees: Path, command: str) -> None:
    if "embed_openclip" in command:  # its model is too large for a test
        code, text = run(f"{command} --dry-run")
        assert code == 0
        assert '"clip": "ViT-H-14/laion2b_s32b_b79k"' in text
        return
    code, text = run(command)
    assert code == 0, text
    out = re.findall(r"--out (\S+)", command)[0]
    names = ("interactions", "validation", "test")
    assert (
        tuple(
            len(rows_of(trees / out, name)) if (trees / out / f"{name}.parquet").exists() else 0
            for name in names
        )
        == RATINGS[out]
    )
    assert images_of(trees / out)
    summary, embed, train = text.strip().splitlines()[-3:]
    assert summary.startswith(f"imported {sum(RATINGS[out])} ratings ({RATINGS[out][0]} of training")
    assert embed == (
        f"next: rebeca embed --config jobs/configs/embed_openclip.yaml items={out}/items out={out}/embedded"
    )
    assert train.startswith(
        f"then: rebeca train --config train.yaml interactions.path={out}/interactions.parquet "
        f"items={out}/embedded"
    )
    scale = " 'interactions.rating_scale=[0,100]' interactions.like_threshold=75"
    assert train.endswith(scale) == (out == "lapis")


def test_the_printed_training_settings_are_read(trees: Path) -> None:
    run("rebeca data lapis LAPIS --out lapis")
    settings = "interactions.path=lapis/interactions.parquet items=lapis/embedded"
    scale = "'interactions.rating_scale=[0,100]' interactions.like_threshold=75"
    config = "jobs/configs/train_stickers.yaml"
    code, text = run(f"rebeca train --config {config} {settings} {scale} --dry-run")
    assert code == 0, text
    assert '"like_threshold": 75.0' in text


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("rebeca data flickr-aes nowhere --out o", "cannot be read"),
        ("rebeca data flickr-aes FLICKR-AES --out photos", "out photos: holds 1.jpg"),
        ("rebeca data pick-a-pic PAMELA --out o", "no file train-*.parquet there"),
        ("rebeca data folder photos --out o", "holds 1.jpg; expected <user>/likes/<image>"),
        ("rebeca data csv ratings.csv --images photos --out o", "'user_id' of the header is missing"),
        (
            "rebeca data csv ratings.csv --images photos --out o rater=user_id",
            "unknown; did you mean 'rating'",
        ),
    ],
)
def test_a_failure_is_one_line_with_exit_code_2(trees: Path, command: str, message: str) -> None:
    code, text = run(command)
    assert code == 2
    assert message in text
    assert len(text.strip().splitlines()) == 1
    assert not (trees / "o").exists()


def test_missing_images_and_repeats_as_a_person_meets_them(trees: Path) -> None:
    (trees / "FLICKR-AES" / "40K" / "a.jpg").unlink()
    words = [REBECA, "data", "flickr-aes", "FLICKR-AES", "--out", "flickr"]
    ran = subprocess.run(words, cwd=trees, capture_output=True, text=True, timeout=120, check=False)
    assert ran.returncode == 2
    assert "1 of 2 rated images are missing ('a.jpg')" in ran.stderr.splitlines()[-1]
    ran = subprocess.run(
        [*words, "--allow-missing"], cwd=trees, capture_output=True, text=True, timeout=120, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert "their 2 ratings are left out" in ran.stderr
    assert ran.stdout.splitlines()[0] == (
        "imported 1 ratings (1 of training) of 1 users on 1 images -> flickr"
    )
    with (trees / "ratings.csv").open("a") as file:
        file.write("ann,1,2\n")
    command = (
        "rebeca data csv ratings.csv --images photos --out rated user_id=rater item_id=photo rating=stars"
    )
    assert run(command)[0] == 2
    assert run(f"{command} --repeated last")[0] == 0
    assert rows_of(trees / "rated") == [("ann", "1", 2.0)]
