"""Simulated users of the stickers: interactions to learn from, and their hidden taste to check against.

A user's like probability depends on a sticker's style and subcategory alone: `logit p = BIAS + TEMPERATURE
* (style taste + category taste + subcategory taste)`. Each user has a few loves and a few hates. A rating
is `logit p` plus logistic noise, cut at fixed thresholds, so that `P(rating >= 4) = p` exactly. Popularity
and, mildly, taste decide the items that a user rates, as a recommender would.

BIAS and TEMPERATURE were set once. With them, the like rate is 0.25, and the AUC of p against the noisy
likes is 0.85.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rebeca_ray import schemas
from rebeca_ray.stickers import ITEMS
from rebeca_ray.storage.writable import require_writable

# Simulated users rate and see nothing else, so their interactions have no event.
RATINGS = pa.schema([field for field in schemas.INTERACTIONS if field.name != "event"])
BIAS = -3.1
TEMPERATURE = 0.97
POPULARITY_EXPONENT = 0.6
EXPOSURE_BY_TASTE = 0.5
MIN_RATINGS, MAX_RATINGS, MEDIAN_RATINGS, LOG_SPREAD = 20, 400, 70, 0.8
RATING_THRESHOLDS = (-2.5, -1.2, 0.0, 1.3)  # between ratings 1|2|3|4|5, on the logit scale
LAST_DAY = np.datetime64("2026-01-31", "us")
CHUNK = 500


@dataclass(frozen=True, kw_only=True)
class World:
    """The items as users see them: each item's (style, subcategory) pair, and its popularity.

    Shapes: I items, P pairs.
    """

    item_id: np.ndarray  # [I]
    pair: np.ndarray  # [I] index into `pairs`
    pairs: list[tuple[str, str]]  # every (style, subcategory) that exists
    category_of_pair: np.ndarray  # [P]
    styles: list[str]
    subcategories: list[str]
    categories: list[str]
    log_popularity: np.ndarray  # [I]


def load_world(path: Path = ITEMS) -> World:
    """Read the items' columns. Popularity is a fixed long-tailed draw over them."""
    table = pq.read_table(path, columns=["item_id", "style", "category", "subcategory"]).to_pydict()
    keys = list(zip(table["style"], table["subcategory"], strict=True))
    pairs = sorted(set(keys))
    index = {pair: number for number, pair in enumerate(pairs)}
    category = dict(zip(table["subcategory"], table["category"], strict=True))
    categories = sorted(set(category.values()))
    rank = np.random.default_rng(0).permutation(len(keys)) + 1
    return World(
        item_id=np.array(table["item_id"]),
        pair=np.array([index[key] for key in keys]),
        pairs=pairs,
        category_of_pair=np.array([categories.index(category[subcategory]) for _, subcategory in pairs]),
        styles=sorted(set(table["style"])),
        subcategories=sorted(category),
        categories=categories,
        log_popularity=-POPULARITY_EXPONENT * np.log(rank),
    )


def draw_taste(world: World, random: np.random.Generator) -> np.ndarray:
    """Return one user's like logit [P] of every pair: a few loves, a few hates, little between."""
    style = random.normal(0, 0.3, len(world.styles))
    loved, hated = random.permutation(len(world.styles))[:2]
    style[loved] += 1.8
    style[hated] -= 1.5
    category = random.normal(0, 0.3, len(world.categories))
    loved_categories = random.permutation(len(world.categories))[: random.integers(1, 3)]
    category[loved_categories] += 1.0
    subcategory = random.normal(0, 0.4, len(world.subcategories))
    category_of = np.zeros(len(world.subcategories), int)
    for (_, name), number in zip(world.pairs, world.category_of_pair, strict=True):
        category_of[world.subcategories.index(name)] = number
    weight = np.where(np.isin(category_of, loved_categories), 8.0, 1.0)
    loves = random.choice(len(weight), size=random.integers(5, 11), replace=False, p=weight / weight.sum())
    hates = random.permutation(np.setdiff1d(np.arange(len(weight)), loves))[: random.integers(5, 11)]
    subcategory[loves] += 2.2
    subcategory[hates] -= 2.0
    style_of = np.array([world.styles.index(name) for name, _ in world.pairs])
    subcategory_of = np.array([world.subcategories.index(name) for _, name in world.pairs])
    return BIAS + TEMPERATURE * (
        style[style_of] + category[world.category_of_pair] + subcategory[subcategory_of]
    )


def simulate(num_users: int, seed: int, out: Path, num_requested: int = 100) -> int:
    """Write `interactions.parquet`, `truth.parquet`, and a `request.parquet` for some of the users.

    User k of seed s has the same taste and ratings for every `num_users`. Returns the number of ratings.
    """
    world = load_world()
    require_writable(str(out), "--out")
    out.mkdir(parents=True, exist_ok=True)
    truth_schema = pa.schema(
        [
            ("user_id", pa.string()),
            ("style", pa.string()),
            ("subcategory", pa.string()),
            ("like_probability", pa.float32()),
        ]
    )
    style_column = pa.array([style for style, _ in world.pairs])
    subcategory_column = pa.array([subcategory for _, subcategory in world.pairs])
    num_ratings = 0
    with (
        pq.ParquetWriter(out / "interactions.parquet", RATINGS, compression="zstd") as interactions,
        pq.ParquetWriter(out / "truth.parquet", truth_schema, compression="zstd") as truth,
    ):
        for start in range(0, num_users, CHUNK):
            rated, known = [], []
            for number in range(start, min(start + CHUNK, num_users)):
                user_id = user_name(seed, number)
                random = np.random.default_rng((seed, number))
                logit = draw_taste(world, random)
                rated.append(draw_ratings(world, user_id, logit, random))
                probability = (1 / (1 + np.exp(-logit))).astype(np.float32)
                known.append(
                    pa.table(
                        [pa.array([user_id] * len(logit)), style_column, subcategory_column, probability],
                        schema=truth_schema,
                    )
                )
            ratings = pa.concat_tables(rated)
            num_ratings += ratings.num_rows
            interactions.write_table(ratings)
            truth.write_table(pa.concat_tables(known))
    requested = range(0, num_users, -(-num_users // num_requested))
    pq.write_table(
        pa.table({"user_id": [user_name(seed, number) for number in requested]}), out / "request.parquet"
    )
    return num_ratings


def user_name(seed: int, number: int) -> str:
    return f"s{seed}-u{number:07d}"


def draw_ratings(world: World, user_id: str, logit: np.ndarray, random: np.random.Generator) -> pa.Table:
    """Return one user's ratings in order of time: a long-tailed number of distinct items, integers 1-5."""
    count = int(np.clip(MEDIAN_RATINGS * np.exp(LOG_SPREAD * random.normal()), MIN_RATINGS, MAX_RATINGS))
    item_logit = logit[world.pair]
    # Gumbel top-k: draws `count` distinct items with probability proportional to popularity and taste.
    keys = (
        world.log_popularity + EXPOSURE_BY_TASTE * (item_logit - BIAS) + random.gumbel(size=len(item_logit))
    )
    items = np.argpartition(-keys, count)[:count]
    rating = 1 + np.searchsorted(
        RATING_THRESHOLDS, item_logit[items] + random.logistic(size=count), side="right"
    )
    age = np.sort(random.integers(0, 365 * 86_400_000_000, count))[::-1]
    return pa.table(
        {
            "user_id": [user_id] * count,
            "item_id": world.item_id[items],
            "rating": rating.astype(np.float32),
            "timestamp": LAST_DAY - age.astype("timedelta64[us]"),
        },
        schema=RATINGS,
    )
