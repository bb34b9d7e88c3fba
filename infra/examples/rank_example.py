#!/usr/bin/env python3
"""An example ranker to improve on: it ranks a user's generated items and retrieved real items in one list.

`python infra/examples/rank_example.py [--user ID] [--catalog CATALOG] [--items FOLDER] [--interactions FILE]
[--prior FOLDER] [--top N]`

The prior's selector predicts like probabilities from the user's ratings. It retrieves the best real items
that the user has not rated, and it ranks both kinds. A generated item is a row like any other: its embedding
comes from the catalog.

The same selector guided and chose the generated items, so it thinks too well of them. A ranker of yours,
fitted to ratings of both kinds, is a fairer judge.

Shapes: I known items, R rated ones, K retrieved ones, M generated items, N of both, D embed dim, F factors.
"""

from typing import Annotated

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
import typer
from rich.table import Table

from rebeca_ray import read_catalog
from rebeca_ray.catalog.read import Snapshot
from rebeca_ray.cli.runner import plain_errors, run_script
from rebeca_ray.config.sections import InteractionSettings
from rebeca_ray.console import console
from rebeca_ray.data.feedback import with_rated
from rebeca_ray.data.interactions import Interactions, read_interactions
from rebeca_ray.data.items import EmbeddedItems, check_items_fit, read_image_embeds
from rebeca_ray.errors import InputError
from rebeca_ray.evaluation.retrieval import retrieve
from rebeca_ray.prior.checkpoint import TrainedPrior, load_prior, read_prior_config
from rebeca_ray.prior.selector import MAX_HISTORY
from rebeca_ray.prior.users import History

STICKERS = "~/rebeca-stickers"


def rank(
    user: Annotated[str | None, typer.Option(help="User to rank for. Default: one of the catalog.")] = None,
    catalog: Annotated[
        str, typer.Option(help="The catalog's folder: a local path or s3://bucket/prefix.")
    ] = f"{STICKERS}/catalog",
    items: Annotated[str, typer.Option(help="Folder of embedded real items.")] = f"{STICKERS}/items",
    interactions: Annotated[
        str, typer.Option(help="Parquet file of ratings.")
    ] = f"{STICKERS}/interactions.parquet",
    prior: Annotated[str, typer.Option(help="Folder of the prior, for its selector.")] = f"{STICKERS}/prior",
    top: Annotated[int, typer.Option(min=1, help="Number of rows to show.")] = 20,
) -> None:
    """Rank the generated and the retrieved items that a user has not rated yet."""
    with plain_errors():
        snapshot = read_catalog(catalog)
        check_items_fit(items, read_prior_config(prior))
        trained, real = load_prior(prior), read_image_embeds(items)
        if trained.selector is None:
            raise InputError(f"prior {prior}: has no selector; train it on ratings with likes")
        if snapshot.manifest.embed_dim != trained.scaler.embed_dim:
            raise InputError(
                f"items {items}: embeddings of size {trained.scaler.embed_dim}, "
                f"the catalog's have {snapshot.manifest.embed_dim}"
            )
        settings = InteractionSettings(path=interactions, hold_out=0.0, min_likes=0)
        ratings = read_interactions(settings)
        known = with_rated(real, catalog, settings)  # the real items come first
        if set(known.item_id).isdisjoint(ratings.item_id):
            raise InputError(
                "interactions: none of them rates a known item; "
                "give the interactions and the items of the same catalog"
            )
        user = user or default_user(snapshot)
        row_R, like_R = ratings_of(user, ratings, known)
        generated = snapshot.for_user(user, ["item_id", "image_embeds", "nearest_item_id"])
        if not generated.num_rows and user not in ratings.user_id:
            raise InputError(
                f"user {user!r}: neither in the catalog nor in the interactions; give another with --user"
            )
        ranked = rank_together(trained, known, len(real.item_id), row_R, like_R, generated, top)
        show(ranked.slice(0, top), f"for {user}: {like_R.sum()} likes and {(1 - like_R).sum()} dislikes")


def default_user(snapshot: Snapshot) -> str:
    """Return the last user of a file of items."""
    files = snapshot.files.filter(
        pc.and_(pc.equal(snapshot.files["table"], "items"), pc.not_equal(snapshot.files["max_user_id"], ""))
    )
    if not files.num_rows:
        raise InputError(f"catalog {snapshot.root}: has no items; give a user with --user")
    return str(files["max_user_id"][0])


def ratings_of(user: str, ratings: Interactions, known: EmbeddedItems) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows of the known items that a user rated, and whether they liked each; the latest last."""
    row_of = {item_id: row for row, item_id in enumerate(known.item_id)}
    is_theirs = (ratings.user_id == user)[ratings.user_index]
    item_ids, likes = ratings.item_id[is_theirs], ratings.like[is_theirs]
    is_known = np.array([item_id in row_of for item_id in item_ids], bool)
    return np.array([row_of[item_id] for item_id in item_ids[is_known]], int), likes[is_known]


@torch.inference_mode()
def rank_together(
    trained: TrainedPrior,
    known: EmbeddedItems,
    num_real: int,
    row_R: np.ndarray,
    like_R: np.ndarray,
    generated: pa.Table,
    num_retrieved: int,
) -> pa.Table:
    """Return a user's generated items and retrieved real items by like probability, without the rated ones.

    The first `num_real` known items are real. `ratings_of` gives `row_R` and `like_R`.
    """
    selector, scaler = trained.selector, trained.scaler
    is_rated = pc.is_in(generated["item_id"], value_set=pa.array(known.item_id[row_R], pa.string()))
    generated = generated.filter(pc.invert(is_rated))
    embeds_MD = generated["image_embeds"].combine_chunks().flatten().to_numpy().astype(np.float32)
    x_MD = scaler.scale(torch.from_numpy(embeds_MD.reshape(-1, scaler.embed_dim)))
    x_ID = scaler.scale(torch.from_numpy(known.image_embeds))

    latest_R = row_R[-MAX_HISTORY:]
    history = History(
        item_BLD=x_ID[None, latest_R],
        like_BL=torch.from_numpy(like_R[None, -MAX_HISTORY:]),
        age_BL=torch.zeros(1, len(latest_R)),  # the selector ignores it
        present_BL=torch.ones(1, len(latest_R), dtype=torch.bool),
    )
    factor_1F = selector.user_factors(history)
    rated_real = row_R[row_R < num_real]
    (row_K,) = retrieve(selector, factor_1F, x_ID[:num_real].numpy(), [rated_real], num_retrieved)

    x_ND = torch.cat([x_MD, x_ID[row_K]])
    like_N = selector.like_probability(x_ND, factor_1F.expand(len(x_ND), -1))
    return pa.table(
        {
            "like_probability": like_N.numpy(),
            "kind": ["generated"] * len(x_MD) + ["retrieved"] * len(row_K),
            "item_id": generated["item_id"].to_pylist() + known.item_id[row_K].tolist(),
            "most_like": generated["nearest_item_id"].fill_null("").to_pylist() + [""] * len(row_K),
        }
    ).sort_by([("like_probability", "descending")])


def show(ranked: pa.Table, title: str) -> None:
    """Print ranked items."""
    table = Table("", "P(like)", "kind", "item", "most like", title=title)
    for number, item in enumerate(ranked.to_pylist(), 1):
        table.add_row(
            str(number), f"{item['like_probability']:.3f}", item["kind"], item["item_id"], item["most_like"]
        )
    console.print(table)
    num_generated = ranked["kind"].to_pylist().count("generated")
    console.print(
        f"{num_generated} of these {ranked.num_rows} items are generated, "
        f"{ranked.num_rows - num_generated} are retrieved real items"
    )


if __name__ == "__main__":
    run_script(rank)
