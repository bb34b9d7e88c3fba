"""Steer one user: draw images under other ratings and settings, in memory.

a user's ratings + votes + settings -> a history of one user -> chosen candidates -> images

The noise is that of the user's items in the catalog. Without votes and settings the images are the published
ones, so every difference comes from the person who steers.

Shapes: I items that may have been rated, D embed dim.
"""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from rebeca_ray import identity, schemas
from rebeca_ray.config.fields import Fraction, GuidanceWeight, Settings
from rebeca_ray.config.jobs import GenerateConfig
from rebeca_ray.config.people import ColumnNames
from rebeca_ray.config.sections import InteractionSettings, SamplerSettings
from rebeca_ray.data.feedback import each_once, rated_folder, read_known
from rebeca_ray.data.histories import Histories, build_histories, write_histories
from rebeca_ray.data.validation import check_columns
from rebeca_ray.decoder.build import check_decoder
from rebeca_ray.decoder.choices import choose
from rebeca_ray.decoder.files import identify_decoder
from rebeca_ray.errors import InputError
from rebeca_ray.generation.context import with_current_versions
from rebeca_ray.generation.request import check_prior_can, open_request
from rebeca_ray.halves.decode import Renderer
from rebeca_ray.halves.sample import LoadedPrior, UserSampler, users_table
from rebeca_ray.prior.checkpoint import read_prior_config
from rebeca_ray.storage.filesystem import join
from rebeca_ray.storage.parquet import write_table

IMAGES = 4
ROWS_AT_ONCE = 500_000  # of the request


class Settled(Settings):
    """The settings that a person may change. By default, each is that of the config."""

    prior_guidance_scale: Annotated[float, Field(ge=1, le=20)] | None = None
    selector_guidance_scale: GuidanceWeight | None = None
    num_inference_steps: Annotated[int, Field(ge=1, le=50)] | None = None
    candidates_per_item: Annotated[int, Field(ge=1, le=64)] | None = None
    diversity: Fraction | None = None
    ratings_per_vote: Annotated[int, Field(ge=1, le=64)] = 8


@dataclass(frozen=True, kw_only=True)
class SteeredUser:
    """A user as the catalog and the interactions know them.

    `ratings` are rows of `schemas.INTERACTIONS`, and `items` the generated items with embeddings that the
    user may vote on. Digest and generation are those of the user's published items.
    """

    user_id: str
    history_digest: str
    generation: int
    ratings: pa.Table
    items: pa.Table


class Steerer:
    """The models of a config, loaded once. One caller at a time.

    Raises InputError if the prior or the decoder of the config cannot be used here.
    """

    def __init__(self, config: GenerateConfig) -> None:
        decoder = choose(config.decoder)
        config = with_current_versions(config)
        self.config = config.model_copy(update={"decoder": decoder, "num_images": IMAGES})
        self.prior_config = read_prior_config(config.prior)
        check_prior_can(self.config, self.prior_config)
        check_decoder(decoder)
        self.fingerprint = identify_decoder(decoder).fingerprint(decoder)
        self.loaded = LoadedPrior.load(self.config)
        self.unchanged = UserSampler(self.config, self.loaded)
        self.renderer = Renderer(decoder)

    @property
    def reads_histories(self) -> bool:
        """Whether votes have an effect."""
        return self.loaded.prior.settings.user_encoder == "history"

    @property
    def has_selector(self) -> bool:
        return self.loaded.prior.selector is not None

    @property
    def is_distilled(self) -> bool:
        """Whether steps and guidance are built into the prior."""
        return self.loaded.prior.sampling.distilled_steps is not None

    @property
    def has_guidance(self) -> bool:
        """Whether the prior was trained for classifier-free guidance and can still be guided."""
        return not self.is_distilled and self.loaded.prior.condition_dropout > 0

    @property
    def sampler(self) -> SamplerSettings:
        """The sampler of the config, with its defaults filled in."""
        return self.unchanged.sampler

    def draw(self, user: SteeredUser, votes: Mapping[str, bool], settled: Settled) -> pa.Table:
        """Return IMAGES rows, best first: `schemas.IMAGES`, `rank` and `like_probability`.

        `votes` says of items whether the user likes them, in place of earlier ratings. A vote counts as
        several ratings, or it would get lost among hundreds. Raises InputError for a setting that the prior
        cannot follow.
        """
        config = self.with_settings(settled)
        row = request_row(config, user.user_id)
        digest = pa.array([user.history_digest])
        users = users_table(row, pa.chunked_array([digest]), bucket=0, seed=user.generation)
        keys = self.unchanged.keys(users)
        with tempfile.TemporaryDirectory(prefix="rebeca-steer-") as folder:
            histories, rated_ID = self.history(
                user, votes, settled.ratings_per_vote, folder, is_variant=users["item_id"].null_count == 0
            )
            chosen = UserSampler(config, self.loaded, histories, rated_ID).choose(users, keys)
        prompt, negative = (text_of(row, name) for name in ("prompt", "negative_prompt"))
        count = len(chosen.rank_K)
        table = pa.table(
            {
                "item_id": [
                    identity.item_id(keys[0], candidate, self.fingerprint, prompt, negative)
                    for candidate in chosen.candidate_K.tolist()
                ],
                "rank": chosen.rank_K,
                "like_probability": pa.nulls(count, pa.float32()) if chosen.like_K is None else chosen.like_K,
                "image_embeds": pa.FixedSizeListArray.from_arrays(
                    pa.array(chosen.embeds_KD.ravel()), type=schemas.image_embeds(chosen.embeds_KD.shape[1])
                ),
                "prompt": [prompt] * count,
                "negative_prompt": [negative] * count,
            }
        )
        return self.renderer.render(table)

    def with_settings(self, settled: Settled) -> GenerateConfig:
        """Return the config with a person's settings in place of its own."""
        changes = settled.model_dump(exclude_none=True, exclude={"ratings_per_vote"})
        sampler = {name: value for name, value in changes.items() if name in SamplerSettings.model_fields}
        selection = {name: value for name, value in changes.items() if name not in sampler}
        config = self.config.model_copy(
            update={
                "sampler": self.config.sampler.model_copy(update=sampler),
                "selection": self.config.selection.model_copy(update=selection),
            }
        )
        check_prior_can(config, self.prior_config)
        return config

    def history(
        self,
        user: SteeredUser,
        votes: Mapping[str, bool],
        ratings_per_vote: int,
        folder: str,
        *,
        is_variant: bool,
    ) -> tuple[Histories | None, np.ndarray | None]:
        """Write the user's history below `folder`. Return it, and the embeddings [I, D] that it counts."""
        items, settings = self.loaded.items, self.config.interactions
        if items is None or settings is None:
            return None, None if items is None else items.image_embeds
        ratings = with_votes(user.ratings, user.user_id, votes, settings)
        ids, rated_ID = self.embedded(user, ratings["item_id"].combine_chunks(), is_variant)
        # Further ratings per vote are ratings of copies, since nobody rates an item twice.
        rows = pc.index_in(pa.array(votes, pa.string()), value_set=pa.array(ids, pa.string())).to_pylist()
        row_of: dict[str, int] = {item: row for item, row in zip(votes, rows, strict=True) if row is not None}
        copies = {f"{item} #{number}": item for item in row_of for number in range(1, ratings_per_vote)}
        if copies:
            rated_ID = np.concatenate([rated_ID, rated_ID[[row_of[item] for item in copies.values()]]])
            ids = np.concatenate([ids, np.array([*copies], object)])
            again = {copy: votes[item] for copy, item in copies.items()}
            ratings = with_votes(ratings, user.user_id, again, settings)
        known = ratings.filter(pc.is_in(ratings["item_id"], value_set=pa.array(ids, pa.string())))
        if not known.num_rows:
            write_histories(schemas.HISTORIES.empty_table(), folder, 0)
            nothing = np.zeros((1, items.image_embeds.shape[1]), np.float32)  # absent ratings need a row
            return Histories(uri=folder, users_of_bucket=[0], digest=""), rated_ID if is_variant else nothing
        path = join(folder, "interactions.parquet")
        write_table(known, path, row_group_size=known.num_rows)
        serving = settings.for_serving(hide_hold_out=self.config.hide_hold_out)
        serving = serving.model_copy(update={"path": path, "columns": ColumnNames(), "user_key": None})
        return build_histories(serving, ids, folder), rated_ID

    def embedded(
        self, user: SteeredUser, rated_id: pa.Array, is_variant: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return ids and embeddings of the rated items, real ones first. For a variant, of all real items."""
        items = self.loaded.items
        assert items is not None
        ids, rated_ID = items.item_id, items.image_embeds
        if not is_variant:  # a few rows instead of a copy of all
            row = pc.index_in(rated_id, value_set=self.loaded.real_item_id).drop_null().to_numpy()
            ids, rated_ID = ids[row], rated_ID[row]
        embed_dim = rated_ID.shape[1]
        folder = rated_folder(self.config.catalog, self.loaded.prior.clip, embed_dim)
        rated = pa.table({"item_id": rated_id})
        generated = pa.concat_tables([read_known(folder, rated, embed_dim), user.items])
        generated = each_once(generated.filter(pc.is_in(generated["item_id"], value_set=rated_id)))
        if not generated.num_rows:
            return ids, rated_ID
        embeds_ID = generated["image_embeds"].combine_chunks().flatten().to_numpy().reshape(-1, embed_dim)
        generated_id = generated["item_id"].to_numpy(zero_copy_only=False)
        return np.concatenate([ids, generated_id]), np.concatenate([rated_ID, embeds_ID])


def with_votes(
    ratings: pa.Table, user_id: str, votes: Mapping[str, bool], settings: InteractionSettings
) -> pa.Table:
    """Return a user's ratings, with a vote in place of an earlier rating of the same item.

    A vote counts as given at the time of the user's latest rating.
    """
    dislike, like = settings.rating_scale
    if "rating" not in ratings.column_names:  # then all are likes
        ratings = ratings.append_column("rating", pa.array([like] * ratings.num_rows, pa.float32()))
    voted = {
        "user_id": [user_id] * len(votes),
        "item_id": [*votes],
        "rating": [like if liked else dislike for liked in votes.values()],
    }
    if "timestamp" in ratings.column_names:
        voted["timestamp"] = [pc.max(ratings["timestamp"]).as_py()] * len(votes)
    is_voted = pc.is_in(ratings["item_id"], value_set=pa.array(votes, pa.string()))
    kept = ratings.filter(pc.invert(is_voted))
    return pa.concat_tables([kept, pa.table({name: voted[name] for name in kept.column_names}, kept.schema)])


def request_row(config: GenerateConfig, user_id: str) -> pa.Table:
    """Return a user's row of the request. Raises InputError for an unknown user."""
    source = open_request(config)
    columns = check_columns(source, schemas.REQUEST)
    for batch in source.batches(columns, ROWS_AT_ONCE):
        rows = batch.filter(pc.equal(batch["user_id"], user_id))
        if rows.num_rows:
            return rows.slice(0, 1)
    raise InputError(f"request {config.request}: lacks this user; give the config of this catalog")


def text_of(row: pa.Table, name: str) -> str:
    """Return a text of a table's first row; empty without such a column."""
    return (row[name][0].as_py() or "") if name in row.column_names else ""
