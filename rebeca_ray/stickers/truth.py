"""The truth check: how much would the simulated users like the images made for them?

Every figure goes through the judge, for real and generated images alike. It is the user's true like
probability, averaged over the judge's probabilities of style and subcategory. Only this module reads
`truth.parquet`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rebeca_ray.errors import InputError
from rebeca_ray.stickers.build.data import to_pixels
from rebeca_ray.stickers.judge import Judge

RETRIEVAL = (
    "Retrieval (f, g): the selector reads a user's training ratings, and chooses as many of the other real "
    "items as were requested. It does not read the held-out ratings, so a chosen item may be a held-out one."
)


class Truth:
    """Hidden tastes of some users, laid out like the judge's outputs.

    Shapes: N images, U users, S styles, C subcategories.
    """

    def __init__(self, path: Path, judge: Judge, user_ids: list[str]) -> None:
        self.judge = judge
        self.row = {user: index for index, user in enumerate(user_ids)}
        table = pq.read_table(path, filters=pc.field("user_id").isin(user_ids))
        user, style, subcategory = (
            pc.index_in(table[name].combine_chunks(), value_set=values).to_numpy()
            for name, values in (
                ("user_id", pa.array(user_ids)),
                ("style", pa.array(judge.styles)),
                ("subcategory", pa.array(judge.subcategories)),
            )
        )
        self.like_USC = np.full(
            (len(user_ids), len(judge.styles), len(judge.subcategories)), np.nan, np.float32
        )
        self.like_USC[user, style, subcategory] = table["like_probability"].to_numpy()

    def like_probability(self, user_ids: list[str], images: np.ndarray) -> np.ndarray:
        """Return the true like probability [N] of uint8 images [N, 64, 64, 3], each for its user."""
        like_NSC = self.like_USC[[self.row[user] for user in user_ids]]
        # No sticker has some pairs of style and subcategory, so no user has a taste for them.
        joint_NSC = self.joint(images) * ~np.isnan(like_NSC)
        return (np.nan_to_num(like_NSC) * joint_NSC).sum((1, 2)) / joint_NSC.sum((1, 2))

    def mean_over_users(self, user_ids: list[str], images: np.ndarray) -> float:
        """Return the mean over every pair of user and image: the expected value of a random pairing."""
        like_USC = self.like_USC[[self.row[user] for user in user_ids]]
        joint_NSC = self.joint(images) * ~np.isnan(like_USC[0])
        joint_NSC /= joint_NSC.sum((1, 2), keepdims=True)
        return float(
            np.einsum("usc,nsc->", np.nan_to_num(like_USC), joint_NSC) / (len(like_USC) * len(joint_NSC))
        )

    def joint(self, images: np.ndarray) -> np.ndarray:
        """Return the judge's joint probability [N, S, C] of style and subcategory."""
        judgement = self.judge(images)
        return judgement.style[:, :, None] * judgement.subcategory[:, None, :]


def true_like_of(path: Path) -> Callable[[list[str], list[bytes]], np.ndarray]:
    """Return a function from the users and the encoded images of items to true like probabilities [N].

    Raises InputError without the file, and later for users who are not in it.
    """
    if not path.is_file():
        raise InputError(f"--truth {path}: no such file; `rebeca stickers simulate` writes truth.parquet")
    judge = Judge()

    def true_like(owners: list[str], encoded: list[bytes]) -> np.ndarray:
        users = sorted(set(owners))
        truth = Truth(path, judge, users)
        if unknown := int(np.isnan(truth.like_USC).all((1, 2)).sum()):
            raise InputError(
                f"--truth {path}: lacks {unknown} of {len(users)} users; give that of the ratings"
            )
        return truth.like_probability(owners, to_pixels(encoded))

    return true_like


@dataclass(frozen=True, kw_only=True)
class TruthCheck:
    """Mean true like probability of seven sets of images."""

    matched: float  # (a) generated items for their own users
    shuffled: float  # (b) the same items for random users
    random_real: float  # (c) random real items
    no_user: float  # (d) items of the prior without user condition
    held_out: float  # (e) each user's own held-out liked items
    retrieved: float  # (f) real items that the selector likes most for each user
    retrieved_with_mmr: float  # (g) the same, chosen by maximal marginal relevance

    def rows(self) -> list[tuple[str, str, float]]:
        """Return `(letter, description, figure)` in the order of a report."""
        return [
            ("a", "generated, for their own users", self.matched),
            ("b", "the same items shuffled between users", self.shuffled),
            ("c", "random real items", self.random_real),
            ("d", "from the prior without user condition", self.no_user),
            ("e", "the users' own held-out liked items", self.held_out),
            ("f", "retrieved real items, for their own users", self.retrieved),
            ("g", "the same, chosen by maximal marginal relevance (MMR)", self.retrieved_with_mmr),
        ]

    def figures(self) -> dict[str, float]:
        """Return the figures under the keys of `figures.json`."""
        return {
            "own": self.matched,
            "dealt": self.shuffled,
            "random_real": self.random_real,
            "no_user": self.no_user,
            "held_out": self.held_out,
            "retrieved": self.retrieved,
            "retrieved_with_mmr": self.retrieved_with_mmr,
        }

    @property
    def ratio_to_shuffled(self) -> float:
        return self.matched / self.shuffled

    @property
    def ratio_to_held_out(self) -> float:
        return self.matched / self.held_out

    @property
    def verdict(self) -> str:
        return f"(a) is {self.ratio_to_shuffled:.2f} × (b) and {self.ratio_to_held_out:.0%} of (e)"
