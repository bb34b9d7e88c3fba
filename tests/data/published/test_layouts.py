"""Each published layout, written and read: exact rows and bytes, and errors with the line and the value."""

import hashlib
import json
import logging
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import pytest

from rebeca_ray.data.published.csv_ratings import column_names, read_csv_ratings
from rebeca_ray.data.published.flickr_aes import read_flickr_aes
from rebeca_ray.data.published.lapis import read_lapis
from rebeca_ray.data.published.pamela import read_pamela
from rebeca_ray.data.published.user_folders import read_user_folders
from rebeca_ray.data.published.write import write_published
from rebeca_ray.errors import InputError
from tests.data.published import trees
from tests.data.published.trees import (
    images_of,
    rows_of,
    write_flickr,
    write_images,
    write_lapis,
    write_pamela,
)


def refused(read: Callable[[], object], *parts: str) -> str:
    """Return the error of `read`, which has all parts, and the form `thing: found; expected; remedy`."""
    with pytest.raises(InputError) as caught:
        read()
    text = str(caught.value)
    assert all(part in text for part in parts), text
    assert text.count("; ") >= 2, text
    assert "\n" not in text
    return text


def test_flickr_aes_with_spaces_in_its_header(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source, out = write_flickr(tmp_path / "flickr"), tmp_path / "out"
    written = write_published(read_flickr_aes(source), str(out))
    assert (written.ratings, written.users, written.items) == ({"interactions": 3}, 2, 2)
    assert rows_of(out) == [("A1", "a.jpg", 5.0), ("A1", "b.jpg", 2.0), ("B2", "a.jpg", 1.0)]
    assert images_of(out) == {"a.jpg": (b"a.jpg", "a.jpg"), "b.jpg": (b"b.jpg", "b.jpg")}
    assert sorted(path.name for path in out.iterdir()) == ["interactions.parquet", "items"]
    (warning,) = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert warning == (
        f"FLICKR-AES {source}: 2 users, 2 images, 3 ratings; published are 210 users, 40,988 images, "
        "193,208 ratings; imported as it is"
    )


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (
            "worker,imagePair,score\nA,a.jpg,5\n\nA,b.jpg,6\n",
            ["line 4 has score '6'", "a whole number from 1 to 5"],
        ),
        ("worker,imagePair,score\nA,a.jpg,4.5\n", ["line 2 has score '4.5'"]),
        ("worker,imagePair,score\nA,a.jpg,good\nA,b.jpg,\n", ["line 2 has score 'good' (and 1 more rows)"]),
        ("worker,imagePair,score\nA,a.jpg,\n", ["line 2 has score None"]),
        ("worker,imagePair,score\n ,a.jpg,3\n", ["line 2 has worker ' '", "expected an id"]),
        ("worker,imagePair,score\nA,,3\n", ["line 2 has imagePair None"]),
        (
            "worker,image,score\nA,a.jpg,3\n",
            ["'imagePair' of the header is missing (worker, image, score)", "'image'?"],
        ),
        ("worker,imagePair,score, score\nA,a.jpg,3,3\n", ["'score' of the header is twice or more"]),
        ("worker,imagePair,score\n", ["has no rows below its header"]),
        ("", ["not readable as CSV"]),
        (
            "worker,imagePair,score\nA,a.jpg,3\nA,b.jpg\n",
            ["not readable as CSV", "Expected 3 columns, got 2"],
        ),
        (
            "worker,imagePair,score\nA,a.jpg,3\nB,a.jpg,1\nA,a.jpg,5\n",
            ["line 4 rates A × a.jpg with 5, line 2 with 3", "--repeated last"],
        ),
    ],
)
def test_flickr_aes_refuses_a_line_by_its_number(tmp_path: Path, text: str, parts: list[str]) -> None:
    source = write_flickr(tmp_path / "flickr", text)
    refused(lambda: read_flickr_aes(source), f"{source}/{trees.FLICKR_CSV}: ", *parts)


def test_a_repeated_rating_may_replace_the_first(tmp_path: Path) -> None:
    source = write_flickr(tmp_path / "flickr", f"{trees.FLICKR}A1,a.jpg,3\n")
    refused(lambda: read_flickr_aes(source), "line 5 rates A1 × a.jpg with 3, line 2 with 5")
    write_published(read_flickr_aes(source, keep_last=True), str(tmp_path / "out"))
    assert rows_of(tmp_path / "out")[0] == ("A1", "a.jpg", 3.0)


def test_a_missing_file_and_a_folder_without_images(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere/FLICKR-AES_image.*cannot be read"):
        read_flickr_aes(str(tmp_path / "nowhere"))
    (tmp_path / trees.FLICKR_CSV).write_text(trees.FLICKR)
    refused(lambda: read_flickr_aes(str(tmp_path)), f"images {tmp_path}/40K: no image there")


def test_pamela_keeps_its_splits(tmp_path: Path) -> None:
    source, out = write_pamela(tmp_path / "pamela"), tmp_path / "out"
    written = write_published(read_pamela(source), str(out))
    assert written.ratings == {"interactions": 2, "validation": 2, "test": 2}
    assert (written.users, written.items) == (4, 3)
    assert rows_of(out) == [("p1", "x/a.png", 5.0), ("p2", "b.png", 1.5)]
    assert rows_of(out, "validation") == [("p1", "b.png", 3.0), ("p3", "b.png", 4.0)]
    assert rows_of(out, "test") == [("9", "c.png", 4.0), ("p2", "c.png", 2.0)]
    assert images_of(out)["x/a.png"] == (b"x/a.png", "a.png")


def test_pamela_refuses_entries_and_pairs_in_two_splits(tmp_path: Path) -> None:
    source = write_pamela(tmp_path / "a", pamela_train=[("p1", "images/b.png", 4), ("p2", "images/b.png", 7)])
    refused(lambda: read_pamela(source), "pamela_train.json: entry 1 has original_score '7'", "from 1 to 5")
    source = write_pamela(tmp_path / "b", pamela_test_seen=[("p1", "images/x/a.png", 2)])
    refused(lambda: read_pamela(source), "p1 × x/a.png is rated with 5 in interactions")
    source = write_pamela(tmp_path / "c", pamela_train=[])
    refused(lambda: read_pamela(source), "holds an empty list")
    file = Path(source) / "annotations" / "pamela_train.json"
    file.write_text(json.dumps([{"participant_id": 1, "original_score": 3}]))
    refused(lambda: read_pamela(source), "entry 0 has no image_path")
    file.write_text("[")
    refused(lambda: read_pamela(source), "not valid JSON")
    file.unlink()
    with pytest.raises(InputError, match=r"pamela_train\.json: cannot be read"):
        read_pamela(source)


def test_lapis_is_split_by_image_and_keeps_its_scale(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source, out = write_lapis(tmp_path / "lapis"), tmp_path / "out"
    written = write_published(read_lapis(source), str(out))
    assert written.rating_scale == (0, 100)
    assert rows_of(out) == [("7", "a.jpg", 88.5)]
    assert rows_of(out, "validation") == [("7", "b.jpg", 0.0)]
    assert rows_of(out, "test") == [("8", "c.jpg", 100.0)]
    assert set(images_of(out)) == {"a.jpg", "b.jpg", "c.jpg"}
    assert "1 of 4 rows have no response; left out" in caplog.text


def test_lapis_without_lists_and_with_wrong_ones(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    # The quoted line break makes the second row end on line 4.
    text = trees.LAPIS.replace("100", "101").replace(",0\n", ",-1\n")
    source = write_lapis(tmp_path / "a", text)
    refused(lambda: read_lapis(source), "line 4 has response '-1' (and 1 more rows)", "from 0 to 100")
    source = write_lapis(tmp_path / "b", sets={"Train": "a.jpg\nb.jpg\n", "Val": "\nb.jpg\n", "Test": ""})
    refused(lambda: read_lapis(source), "ValImageSet.txt: line 2 has 'b.jpg', also on the list")
    source = write_lapis(tmp_path / "c", sets={"Train": "a.jpg", "Val": "b.jpg", "Test": ""})
    assert read_lapis(source).ratings["interactions"].num_rows == 2
    assert "1 rated images are on no list" in caplog.text
    for path in (tmp_path / "c" / "imageset").iterdir():
        path.unlink()
    (tmp_path / "c" / "imageset").rmdir()
    assert list(read_lapis(source).ratings) == ["interactions"]
    assert "has no folder imageset; all ratings are for training" in caplog.text


def test_lapis_without_a_response_or_a_training_image(tmp_path: Path) -> None:
    source = write_lapis(tmp_path / "a", "participant_id,image_filename,response\n1,x/a.jpg,\n")
    refused(lambda: read_lapis(source), "no row has a response")
    source = write_lapis(tmp_path / "b", sets={"Train": "", "Val": "b.jpg\n", "Test": "a.jpg\nc.jpg\n"})
    refused(
        lambda: write_published(read_lapis(source), str(tmp_path / "out")),
        "no rating is left for training (validation, test)",
    )


def test_folders_of_likes_and_dislikes_share_equal_images(tmp_path: Path) -> None:
    folder, out = tmp_path / "users", tmp_path / "out"
    same = {"ann/likes/1.jpg": b"sea", "ann/likes/copy.png": b"sea", "ben/dislikes/x/1.jpg": b"sea"}
    write_images(folder, [*same, "ben/likes/1.jpg"], same)
    (folder / "ann" / "likes" / ".DS_Store").write_bytes(b"")
    sea, other = (hashlib.sha256(data).hexdigest()[:40] for data in (b"sea", b"ben/likes/1.jpg"))
    write_published(read_user_folders(str(folder)), str(out))
    assert rows_of(out) == sorted([("ann", sea, 5.0), ("ben", sea, 1.0), ("ben", other, 5.0)])
    assert images_of(out) == {sea: (b"sea", "1.jpg"), other: (b"ben/likes/1.jpg", "1.jpg")}


def test_folders_refuse_contradictions_and_strays(tmp_path: Path) -> None:
    write_images(tmp_path / "a", ["ann/likes/1.jpg", "ann/2.jpg"])
    refused(lambda: read_user_folders(str(tmp_path / "a")), "holds ann/2.jpg", "<user>/likes/<image>")
    both = {"ann/dislikes/1.jpg": b"sea", "ann/likes/2.jpg": b"sea"}
    write_images(tmp_path / "b", both, both)
    refused(
        lambda: read_user_folders(str(tmp_path / "b")),
        "ann/likes/2.jpg is the same image as ann/dislikes/1.jpg",
    )
    (tmp_path / "c").mkdir()
    refused(lambda: read_user_folders(str(tmp_path / "c")), "no image there")


CSV = "rater,photo,stars,when\nann,1,7,1700000000\nann,b/2.png,3,2026-01-05T10:00:00Z\nben,1,0.5,\n"
NAMES = {"user_id": "rater", "item_id": "photo", "rating": "stars", "timestamp": "when"}


def test_a_csv_file_of_other_names_and_times(tmp_path: Path) -> None:
    write_images(tmp_path / "photos", ["1.jpg", "b/2.png", "c.jpg", "c.png"])
    (tmp_path / "ratings.csv").write_text(CSV)
    data = read_csv_ratings(str(tmp_path / "ratings.csv"), str(tmp_path / "photos"), NAMES)
    assert data.available == {"1", "1.jpg", "b/2", "b/2.png", "c.jpg", "c.png"}
    write_published(data, str(tmp_path / "out"))
    assert rows_of(tmp_path / "out") == [
        ("ann", "1", 7.0, datetime(2023, 11, 14, 22, 13, 20)),
        ("ann", "b/2.png", 3.0, datetime(2026, 1, 5, 10)),
        ("ben", "1", 0.5, None),
    ]
    assert images_of(tmp_path / "out") == {"1": (b"1.jpg", "1.jpg"), "b/2.png": (b"b/2.png", "2.png")}


def test_a_csv_file_keeps_the_latest_of_repeated_ratings(tmp_path: Path) -> None:
    write_images(tmp_path / "photos", ["1.jpg"])
    text = "user_id,item_id,rating,timestamp\nann,1,5,1700000002\nann,1,1,1700000001\nann,1,3,\n"
    (tmp_path / "ratings.csv").write_text(text)
    source, images = str(tmp_path / "ratings.csv"), str(tmp_path / "photos")
    refused(
        lambda: read_csv_ratings(source, images), "line 3 rates ann × 1 with 1, line 2 with 5 (and 1 more"
    )
    (row,) = read_csv_ratings(source, images, keep_last=True).ratings["interactions"].to_pylist()
    assert (row["rating"], row["timestamp"]) == (5, datetime(2023, 11, 14, 22, 13, 22))


def test_a_csv_file_refuses_times_and_columns(tmp_path: Path) -> None:
    write_images(tmp_path / "photos", ["1.jpg"])
    source, images = str(tmp_path / "ratings.csv"), str(tmp_path / "photos")
    (tmp_path / "ratings.csv").write_text("user_id,item_id,rating,timestamp\nann,1,5,yesterday\n")
    refused(lambda: read_csv_ratings(source, images), "line 2 has timestamp 'yesterday'", "ISO 8601")
    (tmp_path / "ratings.csv").write_text("user_id,item_id,rating,timestamp\nann,1,5,2026-13-01\n")
    refused(lambda: read_csv_ratings(source, images), "column timestamp (")
    refused(lambda: read_csv_ratings(source, images, {"timestamp": "at"}), "'at' of the header is missing")
    (tmp_path / "ratings.csv").write_text("user_id,item_id,rating\nann,1,inf\n")
    refused(lambda: read_csv_ratings(source, images), "line 2 has rating 'inf'", "expected a number;")
    assert column_names(["user_id=a=b", "rating=r"]) == {"user_id": "a=b", "rating": "r"}
    for pairs, message in ((["user=a"], "unknown; did you mean 'user_id'"), (["rating"], "no name in it")):
        with pytest.raises(InputError, match=message):
            column_names(pairs)
