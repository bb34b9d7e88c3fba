"""Write the report of a study: a self-contained page with tables, plots and pictures.

Shapes: U users.
"""

from dataclasses import dataclass

import numpy as np
from jinja2 import Environment, PackageLoader

from rebeca_ray.evaluation.diversity import novelty
from rebeca_ray.pixels import data_uri
from rebeca_ray.storage.filesystem import join
from rebeca_ray.storage.store import open_store
from rebeca_ray.studies.evaluate import TRUE_LIKE, Study
from rebeca_ray.studies.metrics import GuidanceCell, Mean
from rebeca_ray.studies.pictures import read_pictures
from rebeca_ray.studies.plots import (
    plot_calibration,
    plot_gains,
    plot_guidance,
    plot_means,
    plot_null,
    plot_users,
    plot_wins,
)
from rebeca_ray.studies.spaces import CLIP

NUM_PICTURES = 8  # of a row
SHOWN_QUANTILES = (("good", 0.95), ("median", 0.5), ("worst", 0.05))
USERS_PER_QUANTILE = 2
FIGURES = {  # beside the like probability
    "vendi": "different items (Vendi)",
    "cosine_within": "cosine of a user's items",
    "cosine_across": "cosine to others' items",
    "novelty": "distance to real items",
    "neighbour_precision": "likes among nearest ratings",
    "neighbour_recall": "liked ratings reached",
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


def write_report(study: Study, out: str, images: str | None) -> str:
    """Write `report.html` and the plots to the folder `out`; return the address of the page."""
    template = Environment(loader=PackageLoader("rebeca_ray.studies", "."), autoescape=True).get_template(
        "report.html.j2"
    )
    page = template.render(
        metrics=study.metrics,
        names=FIGURES,
        space=judged_space(study),
        spaces=list(study.sets[0].spaces),
        plots=plots(study, out),
        users=shown_users(study, images),
        interval=interval,
    )
    uri = join(out, "report.html")
    open_store(uri).put(page.encode(), content_type="text/html")
    return uri


def interval(figure: Mean) -> str:
    """Return a mean with its interval, as a table shows it."""
    return f"{figure.mean:.3f} [{figure.low:.3f}, {figure.high:.3f}]"


def judged_space(study: Study) -> str:
    """Return the space that the plots show: images embedded again if there are any."""
    return CLIP if CLIP in study.sets[0].spaces else next(iter(study.sets[0].spaces))


def plots(study: Study, out: str) -> dict[str, str]:
    """Draw all plots; return them as SVG by title."""
    space, sets = judged_space(study), study.metrics.sets
    names = [part.items.name for part in study.sets]
    drawn = {
        "Do users like their items more than those of other users?": plot_null(
            study.sets[0].spaces[space].tests[0], join(out, "permutation.png")
        ),
        "Is the verifier calibrated?": plot_calibration(study.metrics.verifier, join(out, "calibration.png")),
    }
    if TRUE_LIKE in study.sets[0].by_user:
        figures, label = [part.by_user[TRUE_LIKE] for part in study.sets], "true like probability"
        means = [part.true_like_probability for part in sets if part.true_like_probability]
    else:
        figures, label = (
            [part.spaces[space].by_user["like_probability"] for part in study.sets],
            "like probability",
        )
        means = [part.spaces[space].like_probability for part in sets]
    by_name = dict(zip(names, figures, strict=True))
    drawn["Mean of each set"] = plot_means(
        dict(zip(names, means, strict=True)), label, join(out, "means.png")
    )
    if len(names) > 1:
        pair = dict(list(by_name.items())[:2])
        drawn["Every user of the first two sets"] = plot_users(pair, label, join(out, "users.png"))
        drawn["Gains and losses between the first two sets"] = plot_gains(pair, label, join(out, "gains.png"))
        drawn["Share of users who gain"] = plot_wins(by_name, label, join(out, "wins.png"))
    return drawn | guidance_plots(study.metrics.guidance, out)


def guidance_plots(cells: list[GuidanceCell], out: str) -> dict[str, str]:
    """Draw liking and diversity by guidance; return them as SVG by title."""
    if not cells:
        return {}
    return {
        "Liking by guidance of prior and decoder": plot_guidance(
            cells, liking, "like probability", join(out, "guidance-liking.png")
        ),
        "Diversity by guidance of prior and decoder": plot_guidance(
            cells,
            lambda cell: cell.vendi.mean,
            "different items (Vendi)",
            join(out, "guidance-diversity.png"),
        ),
    }


def liking(cell: GuidanceCell) -> float:
    """Return the true like probability where it is known, or else the verifier's."""
    return (cell.true_like_probability or cell.like_probability).mean


def shown_users(study: Study, images: str | None) -> list[ShownUser]:
    """Return users near three quantiles of the like probability, the first set's items, and real ones.

    The rule chooses them, not a person: those at 95%, 50% and 5%, and the next below each.
    """
    items, judge, space = study.sets[0].items, study.judge, judged_space(study)
    like_U = study.sets[0].spaces[space].by_user["like_probability"]
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
    needed_ids = set(real.item_id[needed].tolist())
    pictures = {} if images is None else read_pictures(images, needed_ids)

    def shown(rows: np.ndarray) -> list[str]:
        return [data_uri(pictures[item]) for item in real.item_id[rows].tolist() if item in pictures]

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
