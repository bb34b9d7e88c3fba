"""The demo's page: self-contained HTML with liked and generated stickers, loss curve and truth check."""

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from jinja2 import Environment, PackageLoader

from rebeca_ray.catalog.read import Snapshot
from rebeca_ray.data.interactions import Interactions
from rebeca_ray.pixels import data_uri
from rebeca_ray.schemas import TRAINING
from rebeca_ray.stickers import ITEMS
from rebeca_ray.stickers.judge import Judge
from rebeca_ray.stickers.truth import RETRIEVAL, TruthCheck

NUM_SHOWN = 12
NUM_LIKED = 9


@dataclass(frozen=True, kw_only=True)
class ShownUser:
    """One row of the page. Images are data URIs."""

    user_id: str
    num_likes: int
    liked: list[str]  # latest first
    generated: list[str]  # in rank order


@dataclass(frozen=True, kw_only=True)
class LossCurve:
    """Points of the two SVG lines of the training, and the ends of the axes."""

    width: int
    height: int
    train: str
    validation: str
    low: float
    high: float
    epochs: int


def write_report(
    out: Path,
    *,
    prior: Path,
    snapshot: Snapshot,
    interactions: Interactions,
    check: TruthCheck,
    judge: Judge,
    phases: dict[str, float],
) -> Path:
    """Write `out/report.html` and return its path."""
    # The name ends with `.j2`, so a choice by ending would escape nothing.
    template = Environment(loader=PackageLoader("rebeca_ray.stickers", "."), autoescape=True).get_template(
        "report.html.j2"
    )
    page = out / "report.html"
    out.mkdir(parents=True, exist_ok=True)
    page.write_text(
        template.render(
            users=shown_users(snapshot, interactions),
            check=check,
            ratio=check.ratio_to_shuffled,
            of_held_out=check.ratio_to_held_out,
            retrieval=RETRIEVAL,
            judge=judge.accuracy_line,
            curve=loss_curve(prior / "training.csv"),
            phases=phases,
            manifest=snapshot.manifest,
        )
    )
    return page.absolute()


def shown_users(snapshot: Snapshot, interactions: Interactions) -> list[ShownUser]:
    """Return twelve users of the snapshot, ordered by number of likes, evenly spaced from most to fewest.

    The likes are those of the prior's training data.
    """
    items = snapshot.items(["user_id", "rank", "image_file", "image_row"])
    users = sorted(set(items["user_id"].to_pylist()))
    index_of = {user: index for index, user in enumerate(interactions.user_id.tolist())}
    liked = interactions.like.astype(bool) & (interactions.split == TRAINING)
    num_likes = np.bincount(interactions.user_index[liked], minlength=interactions.num_users)
    users.sort(key=lambda user: (-num_likes[index_of[user]], user))
    positions = np.linspace(0, len(users) - 1, min(NUM_SHOWN, len(users)))
    chosen = [users[round(position)] for position in positions]
    pictures = dict(
        zip(*pq.read_table(ITEMS, columns=["item_id", "image"]).to_pydict().values(), strict=True)
    )
    shown = []
    for user in chosen:
        user_rows = items.filter(np.array([owner == user for owner in items["user_id"].to_pylist()]))
        likes = interactions.item_id[liked & (interactions.user_index == index_of[user])][::-1]
        shown.append(
            ShownUser(
                user_id=user,
                num_likes=int(num_likes[index_of[user]]),
                liked=[data_uri(pictures[item]["bytes"]) for item in likes[:NUM_LIKED]],
                generated=[data_uri(image) for image in snapshot.images(user_rows)],
            )
        )
    return shown


def loss_curve(path: Path, width: int = 640, height: int = 220) -> LossCurve:
    """Return the SVG lines of training and validation loss from a `training.csv`."""
    with path.open() as file:
        rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    losses = [row[name] for row in rows for name in ("train_loss", "val_loss")]
    low, high = min(losses), max(losses)

    def points(name: str) -> str:
        across = width / max(1, len(rows) - 1)
        return " ".join(
            f"{index * across:.1f},{height * (high - row[name]) / (high - low or 1):.1f}"
            for index, row in enumerate(rows)
        )

    return LossCurve(
        width=width,
        height=height,
        train=points("train_loss"),
        validation=points("val_loss"),
        low=low,
        high=high,
        epochs=len(rows),
    )
