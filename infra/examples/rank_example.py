#!/usr/bin/env python3
"""An example ranker to improve on: a logistic model ranks real and generated items together for one user.

`python infra/examples/rank_example.py [--user ID] [--catalog CATALOG] [--items FOLDER] [--interactions FILE]
[--top N]`

The model has three features of a user and an item. They are the item's cosine to the mean of the liked items,
to the mean of the disliked items, and to the nearest liked item. A generated item is a row like any other:
its embedding comes from the catalog.

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
from rebeca_ray.cli.runner import plain_errors, run_script
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
    user: Annotated[str | None, typer.Option(help="User to rank for. Default: one of the catalog.")] = None,
    catalog: Annotated[
        str, typer.Option(help="The catalog's folder: a local path or s3://bucket/prefix.")
    ] = f"{STICKERS}/catalog",
    items: Annotated[str, typer.Option(help="Folder of embedded real items.")] = f"{STICKERS}/items",
    interactions: Annotated[
        str, typer.Option(help="Parquet file of ratings.")
    ] = f"{STICKERS}/interactions.parquet",
    top: Annotated[int, typer.Option(min=1, help="Number of rows to show.")] = 20,
) -> None:
    """Rank the items that a user has not rated yet."""
    with plain_errors():
        snapshot = read_catalog(catalog)
        settings = InteractionSettings(path=interactions, hold_out=0.0, min_likes=0)
        rated = read_interactions(settings)
        real = read_image_embeds(items)
        known = with_rated(real, catalog, settings)
        if snapshot.manifest.embed_dim != real.image_embeds.shape[1]:
            raise InputError(
                f"items {items}: embeddings of size {real.image_embeds.shape[1]}, "
                f"the catalog's have {snapshot.manifest.embed_dim}"
            )
        weights = fit(rated, known)
        user = user or default_user(snapshot)
        show(user, snapshot, rated, real, known, weights, top)


def default_user(snapshot: Snapshot) -> str:
    """Return the last user of a file of items."""
    files = snapshot.files.filter(
        pc.and_(pc.equal(snapshot.files["table"], "items"), pc.not_equal(snapshot.files["max_user_id"], ""))
    )
    if not files.num_rows:
        raise InputError(f"catalog {snapshot.root}: has no items; give a user with --user")
    return str(files["max_user_id"][0])


def unit(embeds: np.ndarray) -> torch.Tensor:
    """Return embeddings of unit length."""
    return F.normalize(torch.from_numpy(embeds))


def features(item_ND: torch.Tensor, liked_LD: torch.Tensor, disliked_LD: torch.Tensor) -> torch.Tensor:
    """Return [N, 4] for items and one user's history, all of unit length: the three cosines, and 1."""
    mean_liked_D, mean_disliked_D = (
        F.normalize(part.sum(0), dim=0) if len(part) else torch.zeros(item_ND.shape[1])
        for part in (liked_LD, disliked_LD)
    )
    nearest_N = (item_ND @ liked_LD.T).amax(1) if len(liked_LD) else torch.zeros(len(item_ND))
    return torch.stack(
        [item_ND @ mean_liked_D, item_ND @ mean_disliked_D, nearest_N, torch.ones(len(item_ND))], dim=1
    )


def history(rated: Interactions, known: EmbeddedItems, user_index: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows of the known items that a user rated, and whether they liked each."""
    item_ids = rated.item_id[rated.user_index == user_index]
    likes = rated.like[rated.user_index == user_index]
    order = np.argsort(known.item_id)
    rows = order[np.searchsorted(known.item_id, item_ids, sorter=order).clip(max=len(order) - 1)]
    is_known = known.item_id[rows] == item_ids
    return rows[is_known], likes[is_known]


def fit(rated: Interactions, known: EmbeddedItems) -> torch.Tensor:
    """Fit the weights [4] of the logistic model.

    The features of a rated item come from the rest of its user's history, without the item itself.
    """
    embeds_ID = unit(known.image_embeds)
    features_of_users, likes = [], []
    num_users = min(USERS_TO_LEARN_FROM, rated.num_users)
    for user_index in np.linspace(0, rated.num_users - 1, num_users).astype(int):
        rows, like = history(rated, known, user_index)
        for number in range(len(rows)):
            others = np.arange(len(rows)) != number
            liked, disliked = (embeds_ID[rows[others & (like == value)]] for value in (1, 0))
            features_of_users.append(features(embeds_ID[rows[number : number + 1]], liked, disliked))
        likes.append(like)
    if not features_of_users:
        raise InputError(
            "interactions: none of them rates a known item; "
            "give the interactions and the items of the same catalog"
        )
    x_N4, like_N = torch.cat(features_of_users), torch.from_numpy(np.concatenate(likes)).float()
    weights = torch.zeros(4, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = F.binary_cross_entropy_with_logits(x_N4 @ weights, like_N) + 1e-4 * weights.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
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
    """Print the best real and generated items that the user has not rated."""
    user_index = np.flatnonzero(rated.user_id == user)
    rows, like = np.array([], int), np.array([], int)
    if len(user_index):
        rows, like = history(rated, known, int(user_index[0]))
    generated = snapshot.for_user(user, COLUMNS)
    if not len(user_index) and not generated.num_rows:
        raise InputError(
            f"user {user!r}: neither in the catalog nor in the interactions; give another with --user"
        )
    item_id = np.concatenate([real.item_id, generated["item_id"].to_numpy(zero_copy_only=False)])
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
        embeds_ID[rows[like == 1]],
        embeds_ID[rows[like == 0]],
    )
    probability = torch.sigmoid(x_N4 @ weights).numpy()
    fresh = ~np.isin(item_id, known.item_id[rows])
    best = np.argsort(-np.where(fresh, probability, -1), kind="stable")[: min(top, fresh.sum())]
    table = Table(
        "",
        "P(like)",
        "",
        "item",
        "most like",
        title=f"for {user}: {int(like.sum())} likes and {int((like == 0).sum())} dislikes",
    )
    for number, row in enumerate(best):
        table.add_row(str(number + 1), f"{probability[row]:.3f}", source[row], item_id[row], near[row])
    console.print(table)
    console.print(
        f"{(source[best] == 'generated').sum()} of the best {len(best)} are generated; "
        f"of all {fresh.sum():,} ranked items {(source[fresh] == 'generated').sum():,} are"
    )


if __name__ == "__main__":
    run_script(rank)
