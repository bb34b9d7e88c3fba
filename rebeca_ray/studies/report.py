"""Write the report of a study: a self-contained page with tables, plots and pictures.

Shapes: U users.
"""

import base64
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jinja2 import Environment, PackageLoader

from rebeca_ray import schemas
from rebeca_ray.data.validation import check_columns
from rebeca_ray.errors import InputError
from rebeca_ray.evaluation.diversity import novelty
from rebeca_ray.storage.parquet import open_parquet
from rebeca_ray.studies.evaluate import Study
from rebeca_ray.studies.metrics import Mean
from rebeca_ray.studies.plots import plot_calibration, plot_null, plot_users, plot_wins

NUM_PICTURES = 8  # of a row
SHOWN_QUANTILES = (("good", 0.95), ("median", 0.5), ("worst", 0.05))
USERS_PER_QUANTILE = 2
FIGURES = {
    "like_probability": "like probability by the verifier",
    "vendi": "different items per user (Vendi score)",
    "cosine_within": "cosine between a user's items",
    "cosine_across": "cosine to other users' items",
    "novelty": "distance to the nearest real item",
    "neighbour_precision": "likes among the nearest test ratings",
    "neighbour_recall": "liked test ratings reached",
}


@dataclass(frozen=True, kw_only=True)
class ShownUser:
    """One user of the report, with pictures as data URIs."""

    user_id: str
    rank: str  # good, median or worst
    like_probability: float
    liked: list[str]
    generated: list[str]
    nearest: list[str]


def write_report(study: Study, out: Path, images: str | None) -> Path:
    """Write `out/report.html` and the plots beside it; return the path of the page."""
    template = Environment(loader=PackageLoader("rebeca_ray.studies", "."), autoescape=True).get_template(
        "report.html.j2"
    )
    page = out / "report.html"
    page.write_text(
        template.render(
            metrics=study.metrics,
            names=FIGURES,
            space=judged_space(study),
            plots=plots(study, out),
            users=shown_users(study, images),
            interval=interval,
        )
    )
    return page.absolute()


def interval(figure: Mean | None) -> str:
    """Return a mean with its interval, as a table shows it."""
    return "" if figure is None else f"{figure.mean:.3f} [{figure.low:.3f}, {figure.high:.3f}]"


def judged_space(study: Study) -> str:
    """Return the space that the plots show: images embedded again if there are any."""
    return list(study.measured[0])[-1]


def plots(study: Study, out: Path) -> dict[str, str]:
    """Draw all plots; return them as SVG by title."""
    space = judged_space(study)
    names = [item_set.name for item_set in study.sets]
    like = {
        name: part[space].by_user["like_probability"]
        for name, part in zip(names, study.measured, strict=True)
    }
    drawn = {
        "Do users like their items more than those of other users?": plot_null(
            study.measured[0][space].tests[0], out / "permutation.png"
        ),
        "Like probability of every user": plot_users(like, FIGURES["like_probability"], out / "users.png"),
        "Is the verifier calibrated?": plot_calibration(study.metrics.verifier, out / "calibration.png"),
    }
    figure, label = like, "like probability"
    if study.true_like:
        figure, label = dict(zip(names, study.true_like, strict=True)), "true like probability"
        drawn["True like probability of every user"] = plot_users(figure, label, out / "true-like.png")
    if len(names) > 1:
        left, right = names[:2]
        drawn["Who gains?"] = plot_wins(figure[left], figure[right], (left, right), label, out / "wins.png")
    return drawn


def shown_users(study: Study, images: str | None) -> list[ShownUser]:
    """Return users near three quantiles of the like probability, the first set's items, and real ones.

    The rule chooses them, not a person: those at 95%, 50% and 5%, and the next below each.
    """
    items, judge, space = study.sets[0], study.judge, judged_space(study)
    like_U = study.measured[0][space].by_user["like_probability"]
    order = np.argsort(like_U, kind="stable")
    real = judge.ratings.items
    chosen = []
    for rank, quantile in SHOWN_QUANTILES:
        last = round(quantile * (len(order) - 1))
        chosen += [(rank, int(order[row])) for row in range(last, last - USERS_PER_QUANTILE, -1) if row >= 0]
    rows_of_user = {user: items.rows_of(user)[:NUM_PICTURES] for _, user in chosen}
    nearest_of_user = {
        user: novelty(items.embeds_ND[rows], real.image_embeds).nearest_row_N
        for user, rows in rows_of_user.items()
    }
    liked_of_user = {
        user: judge.ratings.likes_of_training(int(judge.user_U[user]))[-NUM_PICTURES:][::-1]
        for _, user in chosen
    }
    needed = np.concatenate([*nearest_of_user.values(), *liked_of_user.values()]).astype(int)
    pictures = {} if images is None else read_pictures(images, set(real.item_id[needed].tolist()))

    def shown(rows: np.ndarray) -> list[str]:
        return [pictures[item] for item in real.item_id[rows].tolist() if item in pictures]

    return [
        ShownUser(
            user_id=items.user_id[user],
            rank=rank,
            like_probability=float(like_U[user]),
            liked=shown(liked_of_user[user]),
            generated=[data_uri(items.encoded[row]) for row in rows_of_user[user].tolist()],
            nearest=shown(nearest_of_user[user]),
        )
        for rank, user in chosen
    ]


def read_pictures(uri: str, item_ids: set[str]) -> dict[str, str]:
    """Return pictures of real items by id. Raises InputError if one of them is missing."""
    source = open_parquet(uri, "images")
    pictures: dict[str, str] = {}
    for batch in source.batches(check_columns(source, schemas.ITEMS), 1000):
        ids = batch["item_id"].to_pylist()
        rows = [row for row, item in enumerate(ids) if item in item_ids]
        values = (
            pc.struct_field(batch["image"].combine_chunks(), "bytes")
            .take(pa.array(rows, pa.int64()))
            .to_pylist()
        )
        pictures.update({ids[row]: data_uri(value) for row, value in zip(rows, values, strict=True) if value})
    if missing := item_ids - pictures.keys():
        raise InputError(
            f"images {uri}: no image of {len(missing)} items, such as {min(missing)}; give all real items"
        )
    return pictures


def data_uri(encoded: bytes) -> str:
    """Return an image as an address that holds it."""
    kinds = {b"\x89PNG": "png", b"\xff\xd8": "jpeg", b"RIFF": "webp", b"GIF8": "gif"}
    kind = next((kind for start, kind in kinds.items() if encoded.startswith(start)), "png")
    return f"data:image/{kind};base64," + base64.b64encode(encoded).decode()
