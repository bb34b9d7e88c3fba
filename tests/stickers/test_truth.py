"""The arithmetic of the truth check, with a judge that knows the answer."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rebeca_ray.stickers.judge import Judgement
from rebeca_ray.stickers.truth import RETRIEVAL, Truth, TruthCheck

CHECK = TruthCheck(
    matched=0.4,
    shuffled=0.2,
    random_real=0.1,
    no_user=0.15,
    held_out=0.5,
    retrieved=0.6,
    retrieved_with_mmr=0.55,
)


class KnowingJudge:
    """Read style and subcategory off the first two channel values of the first pixel."""

    styles, subcategories = ("noto", "flat"), ("cat", "food")

    def __call__(self, images: np.ndarray) -> Judgement:
        style, subcategory = images[:, 0, 0, 0], images[:, 0, 0, 1]
        return Judgement(style=np.eye(2)[style], subcategory=np.eye(2)[subcategory])


@pytest.fixture
def truth(tmp_path: Path) -> Truth:
    rows = [
        ("u", "noto", "cat", 0.9),
        ("u", "noto", "food", 0.2),
        ("u", "flat", "cat", 0.4),
        ("v", "noto", "cat", 0.1),
    ]
    rows += [("v", "noto", "food", 0.6), ("v", "flat", "cat", 0.5), ("w", "noto", "cat", 0.0)]
    user, style, subcategory, like = zip(*rows, strict=True)
    pq.write_table(
        pa.table(
            {
                "user_id": user,
                "style": style,
                "subcategory": subcategory,
                "like_probability": pa.array(like, pa.float32()),
            }
        ),
        tmp_path / "truth.parquet",
    )
    judge: Any = KnowingJudge()
    return Truth(tmp_path / "truth.parquet", judge, ["u", "v"])


def image(style: int, subcategory: int) -> np.ndarray:
    picture = np.zeros((64, 64, 3), np.uint8)
    picture[0, 0] = (style, subcategory, 0)
    return picture


def test_each_image_is_read_for_the_user_beside_it(truth: Truth) -> None:
    images = np.stack([image(0, 0), image(0, 0), image(0, 1), image(1, 0)])
    np.testing.assert_allclose(
        truth.like_probability(["u", "v", "u", "v"], images), [0.9, 0.1, 0.2, 0.5], rtol=1e-6
    )


def test_the_mean_over_users_is_every_image_for_everyone(truth: Truth) -> None:
    images = np.stack([image(0, 0), image(0, 1)])
    assert truth.mean_over_users(["u", "v"], images) == pytest.approx((0.9 + 0.2 + 0.1 + 0.6) / 4)


def test_the_verdict_states_both_ratios() -> None:
    assert CHECK.verdict == "(a) is 2.00 × (b) and 80% of (e)"


def test_the_figures_have_the_keys_of_the_documented_results() -> None:
    assert CHECK.figures() == {
        "own": 0.4,
        "dealt": 0.2,
        "random_real": 0.1,
        "no_user": 0.15,
        "held_out": 0.5,
        "retrieved": 0.6,
        "retrieved_with_mmr": 0.55,
    }


def test_the_rows_have_the_letters_that_the_texts_refer_to() -> None:
    letters = {letter: figure for letter, _, figure in CHECK.rows()}
    assert letters == {"a": 0.4, "b": 0.2, "c": 0.1, "d": 0.15, "e": 0.5, "f": 0.6, "g": 0.55}
    assert RETRIEVAL.startswith("Retrieval (f, g)")
