#!/usr/bin/env python3
"""An example of a ranker: real and generated items, ranked together for one user by a logistic model. Start from it, then do better.

`python infra/examples/rank_example.py [--user ID] [--catalog ROOT] [--items FOLDER] [--interactions FILE] [--top N]`

It knows three things of a pair of user and item: the cosine of the item to the mean of what the user liked, to the mean of what they
disliked, and to the liked item it is most like. A generated item is a row like any other: its embedding comes from the catalog.

Shapes: N pairs, I items, D embed dim.
"""

from typing import Annotated

import numpy as np
import pyarrow.compute as pc
import torch
import torch.nn.functional as F
import typer
from rich.table import Table

from rebeca_ray import read_catalog
from rebeca_ray.catalog.read import Snapshot
from rebeca_ray.cli.runner import plain_errors
from rebeca_ray.config.sections import InteractionSettings
from rebeca_ray.console import console
from rebeca_ray.data.feedback import with_rated
from rebeca_ray.data.interactions import Interactions, read_interactions
from rebeca_ray.data.items import EmbeddedItems, read_image_embeds
from rebeca_ray.errors import InputError

STICKERS = "~/rebeca-stickers"
USERS_TO_LEARN_FROM = 300
COLUMNS = ["item_id", "image_embeds", "nearest_item_id"]


def rank(
    user: Annotated[str | None, typer.Option(help="whom to rank for; default: one of the catalog")] = None,
    catalog: Annotated[str, typer.Option(help="root of the catalog")] = f"{STICKERS}/catalog",
    items: Annotated[str, typer.Option(help="embedded real items")] = f"{STICKERS}/items",
    interactions: Annotated[str, typer.Option(help="who rated what")] = f"{STICKERS}/interactions.parquet",
    top: Annotated[int, typer.Option(min=1, help="rows to show")] = 20,
) -> None:
    """Rank what a user has not rated yet."""
    with plain_errors():
        snapshot = read_catalog(catalog)
        rated = read_interactions(InteractionSettings(path=interactions, hold_out=0.0, min_likes=0))
        real = read_image_embeds(items)
        known = with_rated(real, catalog, interactions)
        if snapshot.manifest.embed_dim != real.image_embeds.shape[1]:
            raise InputError(
                f"items {items}: embeddings of size {real.image_embeds.shape[1]}, the catalog's have {snapshot.manifest.embed_dim}"
            )
        weights = fit(rated, known)
        user = user or somebody(snapshot)
        show(user, snapshot, rated, real, known, weights, top)


def somebody(snapshot: Snapshot) -> str:
    """The last user of a file of items."""
    files = snapshot.files.filter(
        pc.and_(pc.equal(snapshot.files["table"], "items"), pc.not_equal(snapshot.files["max_user_id"], ""))
    )
    if not files.num_rows:
        raise InputError(f"catalog {snapshot.root}: has no items; give a user with --user")
    return str(files["max_user_id"][0])


def unit(embeds: np.ndarray) -> torch.Tensor:
    return F.normalize(torch.from_numpy(embeds))


def features(item_ND: torch.Tensor, liked_LD: torch.Tensor, disliked_LD: torch.Tensor) -> torch.Tensor:
    """[N, 4] of items and one user's history, all of unit length: the three cosines, and 1."""
    told = [
        F.normalize(part.sum(0), dim=0) if len(part) else torch.zeros(item_ND.shape[1])
        for part in (liked_LD, disliked_LD)
    ]
    nearest_N = (item_ND @ liked_LD.T).amax(1) if len(liked_LD) else torch.zeros(len(item_ND))
    return torch.stack([item_ND @ told[0], item_ND @ told[1], nearest_N, torch.ones(len(item_ND))], dim=1)


def history(rated: Interactions, known: EmbeddedItems, user_index: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of what a user rated among the known items, and whether they liked it."""
    own = rated.user_index == user_index
    order = np.argsort(known.item_id)
    place = order[np.searchsorted(known.item_id, rated.item_id[own], sorter=order).clip(max=len(order) - 1)]
    found = known.item_id[place] == rated.item_id[own]
    return place[found], rated.like[own][found]


def fit(rated: Interactions, known: EmbeddedItems) -> torch.Tensor:
    """The four weights [4] of the logistic model. An item is told apart from the rest of its user's history, which must not know it."""
    embeds_ID = unit(known.image_embeds)
    rows, likes = [], []
    for user_index in np.linspace(0, rated.num_users - 1, min(USERS_TO_LEARN_FROM, rated.num_users)).astype(
        int
    ):
        place, like = history(rated, known, user_index)
        for number in range(len(place)):
            others = np.arange(len(place)) != number
            liked, disliked = (embeds_ID[place[others & (like == value)]] for value in (1, 0))
            rows.append(features(embeds_ID[place[number : number + 1]], liked, disliked))
        likes.append(like)
    if not rows:
        raise InputError(
            "interactions: none of them rates a known item; give the interactions and the items of one and the same catalog"
        )
    x_N4, like_N = torch.cat(rows), torch.from_numpy(np.concatenate(likes)).float()
    weights = torch.zeros(4, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = F.binary_cross_entropy_with_logits(x_N4 @ weights, like_N) + 1e-4 * weights.square().sum()
        value.backward()
        return value

    optimizer.step(loss)  # type: ignore[arg-type]
    return weights.detach()


def show(
    user: str,
    snapshot: Snapshot,
    rated: Interactions,
    real: EmbeddedItems,
    known: EmbeddedItems,
    weights: torch.Tensor,
    top: int,
) -> None:
    """Print the best of what the user has not rated, real and generated."""
    found = np.flatnonzero(rated.user_id == user)
    place, like = (
        history(rated, known, int(found[0])) if len(found) else (np.array([], int), np.array([], int))
    )
    generated = snapshot.for_user(user, COLUMNS)
    if not len(found) and not generated.num_rows:
        raise InputError(
            f"user {user!r}: neither in the catalog nor in the interactions; give another with --user"
        )
    item_id = np.concatenate([real.item_id, generated["item_id"].to_numpy(zero_copy_only=False).astype(str)])
    source = np.repeat(["real", "generated"], [len(real.item_id), generated.num_rows])
    made_ND = np.array(generated["image_embeds"].to_pylist(), np.float32).reshape(
        generated.num_rows, real.image_embeds.shape[1]
    )
    near = np.concatenate(
        [
            np.full(len(real.item_id), ""),
            generated["nearest_item_id"].fill_null("").to_numpy(zero_copy_only=False),
        ]
    )
    embeds_ID = unit(known.image_embeds)
    x_N4 = features(
        unit(np.concatenate([real.image_embeds, made_ND])),
        embeds_ID[place[like == 1]],
        embeds_ID[place[like == 0]],
    )
    probability = torch.sigmoid(x_N4 @ weights).numpy()
    fresh = ~np.isin(item_id, known.item_id[place])
    best = np.argsort(-np.where(fresh, probability, -1), kind="stable")[: min(top, fresh.sum())]
    table = Table(
        "",
        "P(like)",
        "",
        "item",
        "most like",
        title=f"for {user}, who liked {int(like.sum())} and disliked {int((like == 0).sum())}",
    )
    for number, row in enumerate(best):
        table.add_row(str(number + 1), f"{probability[row]:.3f}", source[row], item_id[row], near[row])
    console.print(table)
    console.print(
        f"{(source[best] == 'generated').sum()} of the best {len(best)} are generated; "
        f"of all {fresh.sum():,} that were ranked {(source[fresh] == 'generated').sum():,} are"
    )


if __name__ == "__main__":
    typer.run(rank)
