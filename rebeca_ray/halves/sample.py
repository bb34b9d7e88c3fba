"""Sample embeddings alone: for notebooks, and for people with a decoder of their own.

prior + users -> their histories or table rows, bucket by bucket -> the choice of planning -> embeddings

An embedding is the one that `rebeca generate` would plan for the same user and rank. Cold-start users share
the embeddings of the population, as they share its items in a catalog, unless they name an item.

Shapes: G users, K embeddings, D embed dim.
"""

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
import torch.nn.functional as F

from rebeca_ray import schemas
from rebeca_ray.catalog.layout import POPULATION_USER
from rebeca_ray.config.jobs import GenerateConfig, SampleConfig
from rebeca_ray.data.feedback import with_rated
from rebeca_ray.data.histories import Histories, build_histories
from rebeca_ray.data.items import EmbeddedItems, check_items_fit, read_image_embeds
from rebeca_ray.data.validation import check_columns, check_ids, check_numbers, check_rows, check_texts
from rebeca_ray.errors import InputError, describe, shown
from rebeca_ray.generation.context import with_current_versions
from rebeca_ray.generation.planning.keys import plan_keys, settings_of_key, users_per_batch
from rebeca_ray.generation.planning.planner import arrow_column
from rebeca_ray.generation.planning.user_loader import UserLoader
from rebeca_ray.generation.request import check_prior_can, check_variants
from rebeca_ray.identity import bucket_of, candidate_seed, read_user_key
from rebeca_ray.prior.candidates import ChosenItems, choose_candidates, judge_candidates, sample_candidates
from rebeca_ray.prior.checkpoint import TrainedPrior, load_prior, read_prior_config
from rebeca_ray.prior.diffusion import Diffusion
from rebeca_ray.progress import counting
from rebeca_ray.storage.parquet import open_parquet, read_table, write_tables
from rebeca_ray.storage.writable import require_new_parquet

ROWS_PER_GROUP = 10_000  # 40 MB at D = 1024
COLUMNS = ("user_id", "item_id", "strength")  # of the requested users


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """The numbers of written embeddings, and of their users."""

    embeddings: int
    users: int
    cold_start_users: int


def sample_embeddings(config: SampleConfig) -> Sampled:
    """Write the embeddings of the users to `config.out`, which appears when it is complete.

    Raises InputError for an output that is missing or exists, and as `open_sampler` does.
    """
    if config.out is None:
        raise InputError("out: is missing; give a Parquet file that receives the embeddings")
    require_new_parquet(config.out)
    sampler, requested = open_sampler(config)
    with closing(sample_all(sampler, requested, config.seed)) as tables:
        written = write_tables(
            tables, sampler.schema, config.out, row_group_size=ROWS_PER_GROUP, embed_column="image_embeds"
        )
    return Sampled(
        embeddings=written["rows"],
        users=written["rows"] // config.num_images,
        cold_start_users=sampler.cold_start_users,
    )


def sample_table(config: SampleConfig, users: Sequence[str] | None = None) -> pa.Table:
    """Return the embeddings in memory, the rows that `sample_embeddings` writes.

    `users` are the ids of users, in place of those of `config.users`. Raises InputError for a config with an
    output, and as `open_sampler` does.
    """
    if config.out is not None:
        raise InputError(
            f"out {config.out}: is set, but the embeddings stay in memory; leave it out, "
            "or write the file with `rebeca sample`"
        )
    sampler, requested = open_sampler(config, None if users is None else table_of(users, config.user_key))
    with closing(sample_all(sampler, requested, config.seed)) as tables:
        return pa.concat_tables([sampler.schema.empty_table(), *tables])


def open_sampler(
    config: SampleConfig, requested: pa.Table | None = None
) -> "tuple[UserSampler, pa.Table | None]":
    """Return the sampler and the users of a config, or those that are `requested`. None means all users.

    Raises InputError for users without ids or repeated ones, and for a prior that misses an input or cannot
    follow the settings.
    """
    config = with_current_versions(config)
    prior_config = read_prior_config(config.prior)
    check_prior_can(config, prior_config)
    if config.items is not None:
        check_items_fit(config.items, prior_config)
    if requested is None and config.users is not None:
        requested = read_users(config.users, config.items, config.user_key)
    sampler = UserSampler.open(config)
    if requested is None and sampler.prior.users is not None:
        requested = sampler.prior.users.select(["user_id"])
    if requested is None and sampler.prior.settings.user_encoder != "history":
        raise InputError(f"prior {config.prior}: knows no users; give users instead of all")
    return sampler, requested


def table_of(user_ids: Sequence[str], user_key: str | None) -> pa.Table:
    """Return users as a table, as pseudonyms if there is a key.

    Raises InputError for a single name, for none, and for repeated ids.
    """
    if isinstance(user_ids, str):
        raise InputError(f"users: are the text {shown(user_ids)}; give a list of users, [{shown(user_ids)}]")
    try:
        users = pa.table({"user_id": pa.array(user_ids, pa.string())})
    except (pa.ArrowException, TypeError) as error:
        raise InputError(f"users: are no list of texts ({describe(error)}); give ids of users") from None
    check_rows(users, "users", "in memory")
    check_ids(users["user_id"], "users", "in memory", "user_id", unique="keep one of each")
    key = read_user_key(user_key)
    return pa.table({"user_id": key.pseudonyms(user_ids)}) if key else users


def read_users(uri: str, items: str | None, user_key: str | None) -> pa.Table:
    """Return the requested users, and the items and strengths of variants if given.

    With a key, the users are pseudonyms.

    Raises InputError for invalid or repeated ids, for none, and for an item or a strength that is invalid.
    """
    source = open_parquet(uri, "users", user_key=read_user_key(user_key))
    users = source.read(check_columns(source, pa.schema([schemas.REQUEST.field(name) for name in COLUMNS])))
    check_rows(users, "users", uri)
    check_ids(users["user_id"], "users", uri, "user_id", unique="keep one row per user")
    if "item_id" in users.column_names:
        check_texts(users["item_id"], "users", uri, "item_id")
    if "strength" in users.column_names:
        check_numbers(users["strength"], "users", uri, "strength")
    check_variants(users, "users", uri, items)
    return users


@dataclass(frozen=True, kw_only=True)
class LoadedPrior:
    """A prior on its device, and the real items that candidates are compared with."""

    prior: TrainedPrior
    diffusion: Diffusion
    items: EmbeddedItems | None = None
    real_unit_ID: torch.Tensor | None = None

    @classmethod
    def load(cls, config: GenerateConfig | SampleConfig) -> Self:
        """Return the prior and the items of a config. Raises InputError for a missing GPU."""
        device = config.sampler.device
        if device == "cuda" and not torch.cuda.is_available():
            raise InputError("sampler.device is cuda, torch sees no GPU here; set sampler.device=cpu")
        prior = load_prior(config.prior, device)
        diffusion = Diffusion.build(prior.diffusion, device)
        if config.items is None:
            return cls(prior=prior, diffusion=diffusion)
        items = read_image_embeds(config.items)
        real_unit_ID = F.normalize(torch.from_numpy(items.image_embeds)).to(device)
        return cls(prior=prior, diffusion=diffusion, items=items, real_unit_ID=real_unit_ID)

    @cached_property
    def real_item_id(self) -> pa.Array | None:
        return None if self.items is None else pa.array(self.items.item_id, pa.string())


class UserSampler:
    """Samples users in batches: their vectors, their candidates, and the choice among these.

    `rated_ID` are the embeddings of the items that `histories` counts.
    """

    def __init__(
        self,
        config: GenerateConfig | SampleConfig,
        loaded: LoadedPrior,
        histories: Histories | None = None,
        rated_ID: np.ndarray | None = None,
    ) -> None:
        self.config, self.loaded, self.prior, self.histories = config, loaded, loaded.prior, histories
        self.sampler = config.sampler.resolve(self.prior.sampling, self.prior.diffusion.num_train_timesteps)
        self.settings = settings_of_key(config, self.sampler)
        self.schema = schemas.sampled(
            self.prior.scaler.embed_dim, prior=self.prior.fingerprint, clip=self.prior.clip
        )
        device = config.sampler.device
        self.loader = UserLoader(self.prior, histories, rated_ID, device, training_only=config.hide_hold_out)
        self.population: pa.Table | None = None
        self.cold_start_users = 0

    @classmethod
    def open(cls, config: SampleConfig) -> Self:
        """Return a sampler of all users of a config."""
        loaded = LoadedPrior.load(config)
        items = loaded.items
        if items is None:
            return cls(config, loaded)
        histories = None
        if config.interactions is not None:
            if config.catalog is not None:
                items = with_rated(items, config.catalog, config.interactions)
            everything = config.interactions.for_serving(hide_hold_out=config.hide_hold_out)
            histories = build_histories(everything, items.item_id, config.storage, catalog=config.catalog)
        return cls(config, loaded, histories, items.image_embeds)

    def keys(self, users: pa.Table) -> list[str]:
        """Return the plan keys of the rows of `users_table`."""
        return plan_keys(users, self.prior.fingerprint, self.settings, self.sampler.variant)

    @torch.inference_mode()
    def choose(self, users: pa.Table, keys: list[str]) -> ChosenItems:
        """Return the chosen candidates of the rows of `users_table`, whose noise follows from `keys`."""
        vectors = self.loader.load(users)
        variants = self.loader.load_variants(users, self.loaded.real_item_id)
        selection = self.config.selection
        count_G = np.full(users.num_rows, self.config.num_images)
        sampled_G = count_G * selection.candidates_per_item
        x_ND, user_N = sample_candidates(
            self.prior, self.loaded.diffusion, self.sampler, vectors, keys, sampled_G, variants
        )
        candidates = judge_candidates(self.prior, vectors.factor_GF, x_ND, user_N)
        return choose_candidates(candidates, count_G, selection, self.loaded.real_unit_ID, variants)

    def sample(self, users: pa.Table) -> pa.Table:
        """Return the rows of `schemas.sampled` for the rows of `users_table`."""
        keys = self.keys(users)
        chosen = self.choose(users, keys)
        numbers = zip(chosen.user_K.tolist(), chosen.candidate_K.tolist(), strict=True)
        columns = {
            "user_id": users["user_id"].take(pa.array(chosen.user_K)),
            "rank": chosen.rank_K,
            "seed": [candidate_seed(keys[user], candidate) for user, candidate in numbers],
            "like_probability": chosen.like_K,
            "image_embeds": chosen.embeds_KD,
        }
        arrays = [arrow_column(columns[field.name], field.type, len(chosen.rank_K)) for field in self.schema]
        return pa.table(arrays, schema=self.schema)

    def sample_population(self, user_id: pa.ChunkedArray, seed: int) -> pa.Table:
        """Return the rows of cold-start users: each gets the embeddings of the population."""
        if self.population is None:
            pool = pa.table({"user_id": [POPULATION_USER]})
            self.population = self.sample(users_table(pool, pa.array([""]), bucket=0, seed=seed))
        self.cold_start_users += len(user_id)
        count = self.config.num_images
        rows = self.population.take(pa.array(np.tile(np.arange(count), len(user_id))))
        users = user_id.take(pa.array(np.repeat(np.arange(len(user_id)), count)))
        return rows.set_column(0, self.schema.field("user_id"), users)


def sample_all(
    sampler: UserSampler, requested: pa.Table | None, seed: int
) -> Generator[pa.Table, None, None]:
    """Yield the rows of `requested`, a batch of users at a time; without it, of all users with ratings.

    The progress shows until the generator is closed.
    """
    num_rated = sampler.histories.num_users if sampler.histories else 0
    total = sampler.config.num_images * (num_rated if requested is None else len(requested))
    with counting("sample", total) as counted:
        yield from counted.tables(sample_batches(sampler, requested, seed))


def sample_batches(sampler: UserSampler, requested: pa.Table | None, seed: int) -> Iterator[pa.Table]:
    size = users_per_batch(sampler.config)
    for users in users_by_bucket(sampler, requested, seed):
        # A cold-start user with an item gets variants of it for the population's taste.
        is_personal = pc.or_(users["history_digest"].is_valid(), users["item_id"].is_valid())
        personal, cold_start = users.filter(is_personal), users.filter(pc.invert(is_personal))["user_id"]
        digest = pc.fill_null(personal["history_digest"], "")
        personal = personal.drop_columns("history_digest").append_column("history_digest", digest)
        for start in range(0, len(personal), size):
            yield sampler.sample(personal.slice(start, size))
        for start in range(0, len(cold_start), size):
            yield sampler.sample_population(cold_start.slice(start, size), seed)


def users_by_bucket(sampler: UserSampler, requested: pa.Table | None, seed: int) -> Iterator[pa.Table]:
    """Yield a `users_table` per bucket of the histories. A null digest marks a cold-start user."""
    prior, histories = sampler.prior, sampler.histories
    num_buckets = 1 if histories is None else len(histories.users_of_bucket)
    if requested is not None:
        bucket_G = np.array([bucket_of(user, num_buckets) for user in requested["user_id"].to_pylist()])
    known = schemas.PRIOR_USERS.empty_table() if prior.users is None else prior.users
    for bucket in range(num_buckets):
        if histories is not None and prior.settings.user_encoder == "history":
            known = read_table(histories.file(bucket), "histories", ["user_id", "history_digest"])
        known_id = known["user_id"].combine_chunks()
        users = pa.table({"user_id": known_id})
        if requested is not None:
            users = requested.filter(pa.array(bucket_G == bucket))
        digest = known["history_digest"].take(pc.index_in(users["user_id"], value_set=known_id))
        yield users_table(users, digest, bucket=bucket, seed=seed)


def users_table(users: pa.Table, digest: pa.ChunkedArray, *, bucket: int, seed: int) -> pa.Table:
    """Return the columns of `schemas.DECISIONS` that sampling reads."""
    item, strength = (
        users[name].cast(schemas.DECISIONS.field(name).type)
        if name in users.column_names
        else pa.nulls(len(users), schemas.DECISIONS.field(name).type)
        for name in ("item_id", "strength")
    )
    columns = {
        "user_id": users["user_id"],
        "history_digest": digest,
        "histories_bucket": np.full(len(users), bucket, np.int32),
        "generation": np.full(len(users), seed, np.int32),
        "item_id": item,
        "strength": strength,
    }
    return pa.table(columns)
