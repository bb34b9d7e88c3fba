"""Pick-a-Pic: pairs become likes and dislikes, and images are read once, in a second pass."""

import logging
from datetime import datetime
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from rebeca_ray.data.published import pick_a_pic
from rebeca_ray.data.published.pick_a_pic import nulls_of, read_pick_a_pic
from rebeca_ray.data.published.write import write_published
from rebeca_ray.errors import InputError
from tests.data.published.test_layouts import refused
from tests.data.published.trees import PAIRS, images_of, pairs_table, rows_of, write_pairs


def day(number: int) -> datetime:
    return datetime(2023, 1, number)


def test_pairs_become_the_latest_like_or_dislike(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source, out = write_pairs(tmp_path / "pairs"), tmp_path / "out"
    written = write_published(read_pick_a_pic(source), str(out))
    assert written.ratings == {"interactions": 3, "validation": 2, "test": 2}
    assert rows_of(out) == [("1", "a1", 1.0, day(2)), ("1", "a2", 1.0, day(1)), ("1", "a3", 5.0, day(2))]
    assert rows_of(out, "validation") == [("3", "c1", 1.0, day(4)), ("3", "c2", 5.0, day(4))]
    assert rows_of(out, "test") == [("3", "d1", 5.0, day(5)), ("3", "d2", 1.0, day(5))]
    uids = ("a1", "a2", "a3", "c1", "c2", "d1", "d2")
    assert images_of(out) == {uid: (f"jpg {uid}".encode(), f"{uid}.jpg") for uid in uids}
    warnings = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert "3 of 5 pairs have no preference or the same image twice; left out" in warnings[0]
    assert "5 train pairs, 1 validation pairs, 1 test pairs; published are 583,747 train pairs" in warnings[1]
    assert "or 959,040 train pairs, 20,596 validation pairs" in warnings[1]


def test_a_pair_without_an_image_is_missing_an_item(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_pairs(tmp_path / "pairs", without=["a3", "d1"])
    file = tmp_path / "pairs" / "data" / "train-00000-of-00001-0a1b2c.parquet"
    assert [nulls_of(pq.read_metadata(file), f"jpg_{side}") for side in (0, 1)] == [0, 1]
    data = read_pick_a_pic(source)
    refused(
        lambda: write_published(data, str(tmp_path / "out")),
        "2 of 7 rated images are missing ('a3', 'd1'); ",
        "leave out their 2 ratings with --allow-missing",
    )
    write_published(data, str(tmp_path / "out"), allow_missing=True)
    assert set(images_of(tmp_path / "out")) == {"a1", "a2", "c1", "c2", "d2"}
    # Without statistics in the footer, the images themselves tell the same.
    monkeypatch.setattr(pick_a_pic, "nulls_of", lambda metadata, column: None)
    assert read_pick_a_pic(source).available == data.available


def test_a_rating_that_stands_in_the_test_too_is_no_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = write_pairs(tmp_path / "pairs", test=[(1, "a3", "d2", 1.0, 0.0, 5)])
    ratings = read_pick_a_pic(source).ratings
    assert ratings["interactions"]["item_id"].to_pylist() == ["a1", "a2"]
    assert ratings["test"].num_rows == 2
    assert "1 ratings of interactions stand in a later split too; left out there" in caplog.text


def test_labels_that_are_no_preference_are_refused_by_row(tmp_path: Path) -> None:
    for number, (first, second) in enumerate([(1.0, 1.0), (2.0, 0.0), (1.0, None)]):
        rows = [*PAIRS["train"], (1, "x", "y", first, second, 1)]
        source = write_pairs(tmp_path / str(number), train=rows)
        refused(
            lambda at=source: read_pick_a_pic(at),
            f"row 5 of train-00000-of-00001-0a1b2c.parquet has label_0 {first}",
        )  # type: ignore[misc]
    source = write_pairs(tmp_path / "user", train=[(1, "x", "", 1.0, 0.0, 1)])
    refused(
        lambda: read_pick_a_pic(source), "row 0 of train-00000-of-00001-0a1b2c.parquet has image_1_uid ''"
    )


def test_files_without_images_or_training_are_refused(tmp_path: Path) -> None:
    table = pairs_table(PAIRS["train"])
    pq.write_table(table, tmp_path / "test-00000-of-00001.parquet")
    refused(lambda: read_pick_a_pic(str(tmp_path)), "no file train-*.parquet there")
    pq.write_table(table.drop_columns(["jpg_1"]), tmp_path / "train-00000-of-00001.parquet")
    refused(lambda: read_pick_a_pic(str(tmp_path)), "'jpg_1' of train-00000-of-00001.parquet is missing")
    pq.write_table(table.drop_columns(["user_id"]), tmp_path / "train-00000-of-00001.parquet")
    with pytest.raises(InputError, match="column 'user_id' is missing"):
        read_pick_a_pic(str(tmp_path))


def test_pairs_without_any_preference_are_no_training(tmp_path: Path) -> None:
    source = write_pairs(tmp_path / "pairs", train=[(1, "x", "y", 0.5, 0.5, 1)])
    data = read_pick_a_pic(source)
    refused(lambda: write_published(data, str(tmp_path / "out")), "no rating is left for training")
