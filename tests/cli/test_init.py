"""`rebeca init`: facts, conversions and configs from people's data, and one line for each mistake."""

import json
import os
import shlex
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from rebeca_ray.cli.commands import app
from rebeca_ray.config.jobs import EmbedConfig, GenerateConfig, TrainConfig
from rebeca_ray.config.load import load_config
from rebeca_ray.data.first_look import sources
from rebeca_ray.data.first_look.look import Look, look
from rebeca_ray.data.interactions import read_interactions
from rebeca_ray.first_configs import MODELS, Machine, config_text
from tests.data.pictures import picture
from tests.data.published.trees import write_images
from tests.test_docs import HAND_WRITTEN, block_commands

CSV = """userId,movieId,stars,timestamp
ann,1,5,1600000000
ann,2,1,1600000000000
ann,2,4,2020-09-13T12:26:41Z
ben,1.png,2,
ben,2,3,1600000000
cat,lost,5,1600000000
dan,broken,5,1600000000
,1,5,1600000000
eve,1,good,1600000000
"""


def run(*words: str) -> tuple[int, str]:
    """Run a command in this process; return its exit code and its output."""
    result = CliRunner().invoke(app, list(words))
    return result.exit_code, result.output


def init(*words: str) -> dict[str, object]:
    """Run `rebeca init` and return its facts."""
    result = CliRunner().invoke(app, ["init", *words, "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def refused(*words: str) -> str:
    """Return the one line of a `rebeca init` that is refused."""
    result = CliRunner().invoke(app, ["init", *words])
    assert result.exit_code == 2, result.output
    (line,) = [line for line in result.stderr.splitlines() if "INFO" not in line]
    return line


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write ratings.csv and photos/ with one broken image, and work beside them."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ratings.csv").write_text(CSV)
    images = {"1.png": picture(), "2.png": picture(), "broken.png": b"no image"}
    write_images(tmp_path / "photos", [*images, "notes.txt"], images)
    return tmp_path


def test_ratings_in_csv_and_a_folder_of_images_become_tables_and_configs(data: Path) -> None:
    facts = init("mine", "--interactions", "ratings.csv", "--items", "photos")
    ratings = facts["interactions"]
    assert ratings["columns"] == {
        "user_id": {"column": "userId", "guessed": True},
        "item_id": {"column": "movieId", "guessed": True},
        "rating": {"column": "stars", "guessed": True},
        "timestamp": {"column": "timestamp", "guessed": False},
    }
    assert (ratings["rows"], ratings["ratings"], ratings["users"], ratings["rated_items"]) == (9, 3, 2, 2)
    assert (ratings["likes"], ratings["dislikes"], ratings["cold_start_users"]) == (2, 1, 1)
    assert (ratings["like_threshold"], ratings["rating_scale"]) == (4.0, [1.0, 5.0])
    assert (ratings["median_likes_per_user"], ratings["repeated_pairs"]) == (1.0, 1)
    assert (ratings["first_time"], ratings["last_time"]) == ("2020-09-13T12:26:40", "2020-09-13T12:26:41")
    assert ratings["unknown_times"] == 1
    assert facts["items"] == {
        "path": str(data / "photos"),
        "format": "folder of images",
        "items": 3,
        "missing_items": 2,
        "missing_examples": ["1.png", "lost"],
        "bad_images": 1,
        "bad_examples": {
            "broken": "is no image that can be read; expected PNG, JPEG, WEBP, GIF, BMP or TIFF"
        },
    }
    assert [(group["number"], group["kind"], group["by"]) for group in facts["left_out"]] == [
        (1, "rows", "init"),
        (1, "rows", "init"),
        (1, "rows", "init"),
        (1, "items", "init"),
        (3, "ratings", "train"),
        (1, "users", "train"),
    ]
    assert facts["files"] == [
        "embed.yaml", "generate.yaml", "interactions.parquet", "items", "request.parquet", "train.yaml"
    ]  # fmt: skip

    table = pq.read_table(data / "mine" / "interactions.parquet")
    assert table.to_pydict()["item_id"] == ["1", "2", "1.png", "2", "lost", "broken"]
    assert table.to_pydict()["rating"] == [5, 4, 2, 3, 5, 5]
    assert pq.read_table(data / "mine" / "items")["item_id"].to_pylist() == ["1", "2"]
    assert pq.read_table(data / "mine" / "request.parquet")["user_id"].to_pylist()[0] == "ann"
    train = load_config(TrainConfig, "mine/train.yaml")
    assert (train.interactions.like_threshold, train.interactions.hold_out) == (4.0, 1.0)
    assert train.interactions.unknown_items == "drop"
    assert read_interactions(train.interactions).num_users == 3  # ann, and two whose only items are missing
    assert load_config(EmbedConfig, "mine/embed.yaml").items == str(data / "mine" / "items")


def test_the_written_configs_run_dry_by_the_printed_commands(data: Path) -> None:
    facts = init("mine", "--interactions", "ratings.csv", "--items", "photos")
    *jobs, gallery = facts["commands"]
    assert gallery == ["rebeca", "gallery", "mine/catalog"]
    for words in jobs:
        code, output = run(*words[1:], "--dry-run")
        assert code == 0, output
        assert json.loads(output)
    code, output = run("init", "again", "--interactions", "ratings.csv", "--items", "photos")
    assert code == 0
    assert "next: rebeca embed --config again/embed.yaml\n" in output
    assert "broken is no image that can be read" in output


def test_json_lines_of_true_and_false_become_likes_and_dislikes(data: Path) -> None:
    lines = [
        {"user": 7, "image": "1.png", "liked": True, "more": {"a": 1}},
        {"user": 7, "image": "2.png", "liked": False},
        {"user": 8, "image": "2.png", "liked": True},
    ]
    (data / "ratings.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    facts = init("mine", "--interactions", "ratings.jsonl", "--items", "photos")
    assert (facts["interactions"]["likes"], facts["interactions"]["dislikes"]) == (2, 1)
    assert (facts["interactions"]["rating_scale"], facts["interactions"]["like_threshold"]) == ([0, 1], 1)
    assert not facts["interactions"]["timestamps"]
    table = pq.read_table(data / "mine" / "interactions.parquet")
    assert table.to_pydict() == {
        "user_id": ["7", "7", "8"],
        "item_id": ["1.png", "2.png", "2.png"],
        "rating": [1, 0, 1],
    }
    assert pq.read_table(data / "mine" / "items")["item_id"].to_pylist() == ["1.png", "2.png"]


def write_parquet(data: Path, user_id: Sequence[str | None] = ("a", "a", "b")) -> None:
    columns = {"who": user_id, "item_id": ["x", "y", "y"], "rating": [5, 1, 4], "time": [1, 2, 3]}
    pq.write_table(pa.table(columns), data / "ratings.parquet")
    image = [
        {"bytes": picture(), "path": None},
        {"bytes": picture(), "path": None},
        {"bytes": b"?", "path": ""},
    ]
    pq.write_table(pa.table({"item_id": ["x", "y", "z"], "image": image}), data / "items.parquet")


def test_parquet_in_form_is_named_and_not_copied(data: Path) -> None:
    write_parquet(data)
    words = ("--interactions", "ratings.parquet", "--items", "items.parquet", "user_id=who")
    facts = init("mine", *words)
    assert facts["files"] == ["embed.yaml", "generate.yaml", "request.parquet", "train.yaml"]
    generate = load_config(GenerateConfig, "mine/generate.yaml")
    assert generate.interactions is not None
    assert generate.interactions.path == str(data / "ratings.parquet")
    assert generate.interactions.columns.model_dump(exclude_none=True) == {
        "user_id": "who",
        "timestamp": "time",
    }
    assert read_interactions(generate.interactions).item_id.tolist() == ["x", "y", "y"]
    embed = load_config(EmbedConfig, "mine/embed.yaml")
    assert (embed.items, embed.bad_images) == (str(data / "items.parquet"), "drop")
    write_parquet(data, ["a", "a", None])  # a row that training refuses
    facts = init("other", *words)
    assert facts["left_out"][0] == {"number": 1, "kind": "rows", "reason": "an empty user_id", "by": "init"}
    assert pq.read_table(data / "other" / "interactions.parquet")["user_id"].to_pylist() == ["a", "a"]


def test_an_existing_folder_stays_as_it_is_and_a_failure_leaves_nothing(data: Path) -> None:
    words = ("--interactions", "ratings.csv", "--items", "photos")
    (data / "mine").mkdir()
    (data / "mine" / "train.yaml").write_text("mine")
    assert "holds train.yaml; expected a new or empty folder" in refused("mine", *words)
    assert [path.read_text() for path in (data / "mine").iterdir()] == ["mine"]
    before = sorted(data.rglob("*"))
    assert "is the current folder" in refused(".", *words)
    assert "lies in the items" in refused("photos/mine", *words)
    assert "is no local folder" in refused("s3://bucket/mine", *words)
    assert sorted(data.rglob("*")) == before


@pytest.mark.parametrize(
    ("text", "options", "problem"),
    [
        ("a;b\n1;2\n", (), "no column for the users among a;b; expected a common name such as user_id"),
        ("u,item\n1,2\n", (), "name yours by user_id=NAME"),
        ("user,x\n1,2\n", (), "no column for the items among user, x"),
        ("user,item\n1,1\n", ("rating=zzz",), "column 'zzz' is missing; known: item, user"),
        ("user,item\n", (), "has no rows"),
        ("user,item,rating\na,1,good\n", (), "none of 1 rows can be used (1 have a rating that is no finite"),
        ("user,item,rating\na,1,good\n", (), "or leave a column out by rating="),
        ("user,item,event\na,1,click\n", (), "or leave a column out by event="),
        ("user,item\na,1\n", ("item_id=",), "column 'item_id=': no name in it"),
        (
            "user,item,rating\na,9,5\n",
            (),
            "ratings name items such as '9', here they are called such as '1.png'",
        ),
        ("user,item,rating\na,1,1\nb,1,2\n", ("--like-threshold", "9"), "expected a number above 1, up to 5"),
        ("user,item,rating\na,1,1\nb,9,5\n", (), "no rating of 1 reaches the like threshold 5"),
        ("user,item\na,1\n", ("--like-threshold", "3"), "every row is a like"),
        ("user,item,user\na,1,a\n", (), "column 'user' is there or named twice"),
    ],
)
def test_a_wrong_table_is_one_line(data: Path, text: str, options: tuple[str, ...], problem: str) -> None:
    (data / "ratings.csv").write_text(text)
    assert problem in refused("mine", "--interactions", "ratings.csv", "--items", "photos", *options)
    assert not (data / "mine").exists()


@pytest.mark.parametrize(
    ("header", "row", "options"),
    [
        ("user,image,label", "cat", ()),
        ("user,image,label,response", "cat,fine", ()),
        ("user,image,label", "3", ("rating=",)),
        ("user,image,rating,event,time", "good,click,1600000000", ("rating=", "event=", "timestamp=")),
    ],
)
def test_columns_of_other_things_can_be_left_out(
    data: Path, header: str, row: str, options: tuple[str, ...]
) -> None:
    (data / "ratings.csv").write_text(f"{header}\na,1,{row}\nb,2,{row}\n")
    facts = init("mine", "--interactions", "ratings.csv", "--items", "photos", *options)
    assert list(facts["interactions"]["columns"]) == ["user_id", "item_id"]
    assert (facts["interactions"]["likes"], facts["left_out"][1:]) == (2, [])
    assert pq.read_table(data / "mine" / "interactions.parquet").column_names == ["user_id", "item_id"]


def test_parquet_with_a_column_to_leave_out_is_converted(data: Path) -> None:
    write_parquet(data)
    init("mine", "--interactions", "ratings.parquet", "--items", "items.parquet", "user_id=who", "rating=")
    table = pq.read_table(data / "mine" / "interactions.parquet")
    assert table.column_names == ["user_id", "item_id", "timestamp"]


def test_json_lines_may_change_after_the_first_block(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "BLOCK_BYTES", 64)
    lines = [
        {"user": 1, "image": "1.png"},
        {"user": 2, "image": "1.png"},
        {"user": 1, "image": "2.png", "rating": None},
        {"user": 2, "image": "2.png", "rating": 4},
        {"user": 3, "image": "2.png", "rating": 1},
        {"user": 4, "image": "2.png", "rating": 4.5},
    ]
    (data / "ratings.jsonl").write_text("\n".join(map(json.dumps, lines)))
    facts = init("mine", "--interactions", "ratings.jsonl", "--items", "photos")
    assert facts["left_out"][0] == {
        "number": 3,
        "kind": "rows",
        "reason": "a rating that is no finite number",
        "by": "init",
    }
    assert pq.read_table(data / "mine" / "interactions.parquet")["rating"].to_pylist() == [4, 1, 4.5]
    (data / "ratings.jsonl").write_text(json.dumps({"user": "a" * 200, "image": "1.png"}) + "\n")
    assert "not readable as JSON lines" in refused(
        "other", "--interactions", "ratings.jsonl", "--items", "photos"
    )


def test_markup_in_a_path_is_plain_text(data: Path) -> None:
    (data / "x[").mkdir()
    os.rename("ratings.csv", "x[/b].csv")
    code, output = run("init", "mine", "--interactions", "x[/b].csv", "--items", "photos")
    assert code == 0, output
    assert "x[/b].csv" in output.replace("\n", "")


def test_opened_images_are_counted(
    data: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("rebeca_ray.progress.SECONDS_BETWEEN_LINES", -1)
    with caplog.at_level("INFO"):
        view_of(data)
    assert "open images: 3 of 3" in caplog.text


def test_wrong_files_are_one_line(data: Path) -> None:
    (data / "list.json").write_text('[{"user": 1}]')
    (data / "empty").mkdir()
    write_images(data / "bad", ["1.png"])
    images = ("--items", "photos")
    assert "not readable as JSON lines" in refused("mine", "--interactions", "list.json", *images)
    assert "not found" in refused("mine", "--interactions", "nothing.csv", *images)
    csv = ("--interactions", "ratings.csv")
    assert "items" in refused("mine", *csv, "--items", "empty")
    assert "1 of 1 images cannot be decoded" in refused("mine", *csv, "--items", "bad")


@pytest.mark.parametrize("name", ['a"b: #x', "{run}, [y]", "null", "- ü 猫 🐈", "%s $(touch z) `w`"])
def test_hostile_names_stay_names(data: Path, name: str) -> None:
    (data / "photos").rename(data / name)
    os.rename("ratings.csv", f"{name}.csv")
    (data / name / f"{name}.png").write_bytes(picture())
    (data / f"{name}.csv").write_text(f"user,item\n{csv_text(name)},{csv_text(name)}\nb,1\n")
    facts = init(f"of {name}", "--interactions", f"{name}.csv", "--items", name)
    assert facts["interactions"]["like_threshold"] is None
    for job, model in MODELS.items():
        config = load_config(model, data / f"of {name}" / f"{job}.yaml")
        assert config.items.startswith(str(data / f"of {name}"))
    assert pq.read_table(data / f"of {name}" / "items")["item_id"].to_pylist() == sorted(["1", "2", name])
    assert shlex.split(shlex.join(facts["commands"][0]))[-1] == f"of {name}/embed.yaml"


def csv_text(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def test_a_control_character_in_a_path_is_refused(data: Path) -> None:
    words = ("--interactions", "ratings.csv", "--items", "photos")
    assert "holds a control character" in refused("a\nout: /x", *words)
    assert "holds a control character" in refused("a\u2028out: /x", *words)


@pytest.mark.parametrize(
    ("ratings", "scale", "threshold", "likes"),
    [
        ("0.5 4 4.5 1", [0, 5], 4.0, 2),
        ("0 1 1 0", [0, 1], 1.0, 2),
        ("-1 1 1 -1", [-1, 1], 1.0, 2),
        ("1 1 1 1", [0, 1], 1.0, 4),
        ("10 88.5 75 0", [0, 100], 75.0, 2),
        ("1 2 3 3", [1, 5], 3.0, 2),  # none lies in the upper quarter
        ("1 1 2 500", [1, 500], 500.0, 1),
        ("7 7 7 7", [1, 10], 7.0, 4),
        ("0.1 0.6 0.7 0.7", [0, 1], 0.7, 2),  # none is above 0.75
        ("0.7 0.7 0.7 0.7", [0, 1], 0.7, 4),
    ],
)
def test_the_like_threshold_fits_the_scale(
    data: Path, ratings: str, scale: list[float], threshold: float, likes: int
) -> None:
    rows = "".join(f"u{number},1,{value}\n" for number, value in enumerate(ratings.split()))
    (data / "ratings.csv").write_text(f"user,item,rating\n{rows}")
    view = look(str(data / "ratings.csv"), str(data / "photos"), {})
    assert view.threshold is not None
    assert (list(view.threshold.scale), view.threshold.like) == (scale, threshold)
    assert view.taste.likes == likes


def view_of(data: Path) -> Look:
    return look(str(data / "ratings.csv"), str(data / "photos"), {})


def test_the_configs_fit_a_gpu_and_many_users(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    view = view_of(data)
    many = replace(view, taste=replace(view.taste, users=1_000_000, median_ratings=30.0))
    gpu = Machine(device="cuda", cores=16)
    for name, text in {job: config_text(job, many, "/data/mine", gpu) for job in MODELS}.items():
        (data / f"{name}.yaml").write_text(text)
    train = load_config(TrainConfig, data / "train.yaml")
    assert (train.preset, train.optimization.steps_per_epoch, train.interactions.hold_out) == (
        None,
        10_000,
        0.1,
    )
    generate = load_config(GenerateConfig, data / "generate.yaml")
    assert generate.decoder.device == generate.sampler.device == train.workers.device == "cuda"
    assert load_config(EmbedConfig, data / "embed.yaml").device == "cuda"


def test_the_commands_of_the_documentation_run(data: Path) -> None:
    commands = {
        command
        for page in HAND_WRITTEN
        for command in block_commands(page)
        if command.startswith("rebeca init")
    }
    assert commands
    for command in commands:
        code, output = run(*shlex.split(command)[1:])
        assert code == 0, output
