"""The planner: rows of decisions become planned items, by the prior and its selector.

decisions of users -> candidates from the prior -> selector, nearest real item -> the best -> planned items

Shapes: G users, N candidates of all of them, K planned items, D embed dim, F factors of the selector, I real
items.
"""

import time
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
import torch.nn.functional as F

from rebeca_ray import identity, schemas
from rebeca_ray.catalog.read import Snapshot
from rebeca_ray.config.jobs import GenerateConfig
from rebeca_ray.data.histories import Histories
from rebeca_ray.data.items import open_items, read_image_embeds
from rebeca_ray.errors import InputError
from rebeca_ray.generation.decisions import Action, Decisions, render_keys, shards_of
from rebeca_ray.generation.parts import NOT_RENDERED, with_busy_seconds
from rebeca_ray.generation.planning.keys import plan_keys, settings_of_key
from rebeca_ray.generation.planning.user_loader import UserLoader
from rebeca_ray.prior.candidates import (
    choose_candidates,
    judge_candidates,
    rescore_items,
    sample_candidates,
)
from rebeca_ray.prior.checkpoint import load_prior
from rebeca_ray.prior.diffusion import Diffusion
from rebeca_ray.storage.parquet import replaced
from rebeca_ray.storage.records import damage_among, damaged_files, listed


class PlanUsers:
    """Ray Data actor: one row of `schemas.DECISIONS` in, that user's planned items out.

    A user to plan gets new items: the best of the candidates that the prior samples. A user to rescore keeps
    the items of the previous snapshot, ranked by the selector of today. `prior/candidates.py` holds the
    mathematics; the actor loads what it needs and maps its columns.
    """

    def __init__(
        self,
        config: GenerateConfig,
        versions: dict[str, str],
        histories: Histories | None,
        previous: Snapshot | None,
        decisions: Decisions,
        items_digest: str | None = None,
    ) -> None:
        self.config, self.versions, self.previous, self.decisions = config, versions, previous, decisions
        self.cached_items: tuple[int, pa.Table] | None = None
        self.prior = load_prior(config.prior, config.sampler.device)
        if self.prior.fingerprint != versions["prior"]:
            raise InputError(f"prior {config.prior}: was replaced while this run was planning; run again")
        self.diffusion = Diffusion.build(self.prior.diffusion, config.sampler.device)
        self.sampler = config.sampler.resolve(self.prior.sampling, self.prior.diffusion.num_train_timesteps)
        self.settings = settings_of_key(config, self.sampler)  # a part of every item's identity
        self.real_item_id: pa.Array | None = None
        self.real_unit_ID: torch.Tensor | None = None
        rated_ID: np.ndarray | None = None
        if config.items:
            items = read_image_embeds(config.items)
            self.real_item_id = pa.array(items.item_id, pa.string())
            self.real_unit_ID = F.normalize(torch.from_numpy(items.image_embeds)).to(config.sampler.device)
            rated_ID = items.image_embeds
            if histories is not None and histories.rated:
                rated_ID = np.concatenate([rated_ID, read_image_embeds(histories.rated).image_embeds])
            if items_digest not in (None, open_items(config.items).digest()):
                raise replaced("items", config.items, "this run was planning")
        self.users = UserLoader(
            self.prior, histories, rated_ID, config.sampler.device, training_only=config.hide_hold_out
        )

    @torch.inference_mode()
    def __call__(self, batch: pa.Table) -> pa.Table:
        started = time.perf_counter()
        batch = batch.combine_chunks()
        parts = [
            self.plan(batch.filter(pc.equal(batch["action"], Action.PLAN))),
            self.rescore(batch.filter(pc.equal(batch["action"], Action.RESCORE))),
        ]
        return with_busy_seconds(pa.concat_tables(parts), time.perf_counter() - started)

    def plan(self, users: pa.Table) -> pa.Table:
        """Return new items for the rows of `users`."""
        embed_dim = self.prior.scaler.embed_dim
        if not users.num_rows:
            return schemas.plan(embed_dim).empty_table()
        vectors = self.users.load(users)
        keys = plan_keys(users, self.versions["prior"], self.settings, self.sampler.variant)
        variants = self.users.load_variants(users, self.real_item_id)

        # Sample more candidates than items. Like probability, real items and diversity choose among them.
        selection = self.config.selection
        count_G = users["num_images"].to_numpy().astype(np.int64)
        sampled_G = count_G * selection.candidates_per_item
        x_ND, user_N = sample_candidates(
            self.prior, self.diffusion, self.sampler, vectors, keys, sampled_G, variants
        )
        candidates = judge_candidates(self.prior, vectors.factor_GF, x_ND, user_N)
        chosen = choose_candidates(candidates, count_G, selection, self.real_unit_ID, variants)

        # Repeat the users' columns per item. An item's id follows from its user's key and prompts.
        user_K = chosen.user_K
        shard_G = shards_of(render_keys(users, self.decisions.by_urgency), self.decisions.boundaries)
        cold_start_G = users["cold_start"].to_numpy(zero_copy_only=False)
        user_factors, nearest_item_id = None, None
        if vectors.factor_GF is not None:
            # Null for a variant: the quality gate tests the prior's samples, which have no given item.
            is_variant_K = users["item_id"].take(user_K).is_valid().to_numpy()
            factors = arrow_column(vectors.factor_GF.cpu().numpy(), pa.list_(pa.float32()), len(keys))
            user_factors = factors.take(pa.array(user_K, mask=is_variant_K))
        if self.real_item_id is not None:
            nearest_item_id = self.real_item_id.take(pa.array(chosen.nearest_K))
        per_item = users.select(["user_id", "bucket", "prompt", "negative_prompt"]).take(user_K)
        prompts = (per_item[name].to_pylist() for name in ("prompt", "negative_prompt"))
        rows = zip(user_K.tolist(), chosen.candidate_K.tolist(), *prompts, strict=True)
        decoder = self.versions["decoder"]
        return planned_table(
            {
                **{name: per_item[name] for name in per_item.column_names},
                "item_id": [
                    identity.item_id(keys[user], candidate, decoder, prompt, negative_prompt)
                    for user, candidate, prompt, negative_prompt in rows
                ],
                "rank": chosen.rank_K,
                "image_embeds": chosen.embeds_KD,
                "like_probability": chosen.like_K,
                "user_factors": user_factors,
                "sampled_factors": chosen.sampled_factor_KF,
                "nearest_item_id": nearest_item_id,
                "nearest_similarity": chosen.similarity_K,
                "origin": np.where(cold_start_G[user_K], schemas.POPULATION, schemas.NEW),
                "shard": shard_G[user_K],
            },
            embed_dim,
        )

    def rescore(self, users: pa.Table) -> pa.Table:
        """Return the previous items of `users`, ranked by the like probability of today's selector."""
        embed_dim = self.prior.scaler.embed_dim
        if not users.num_rows or self.previous is None:
            return schemas.plan(embed_dim).empty_table()
        buckets = users["bucket"].unique().to_pylist()
        items = pa.concat_tables([self.previous_items(bucket) for bucket in buckets])
        user_ids = users["user_id"].combine_chunks()
        items = items.filter(pc.is_in(items["user_id"], value_set=user_ids)).combine_chunks()
        user_K = pc.index_in(items["user_id"], value_set=user_ids).to_numpy()
        embeds_KD = items["image_embeds"].combine_chunks().flatten().to_numpy().reshape(-1, embed_dim)
        factor_GF = self.users.load(users).factor_GF
        rescored = rescore_items(self.prior, factor_GF, embeds_KD, user_K, self.sampler.batch_size)

        # Keep the items' columns in their new order, beside the columns of their users.
        item_columns = items.select(["item_id", "user_id", "nearest_item_id", "nearest_similarity"])
        user_columns = users.select(["bucket", "prompt", "negative_prompt"])
        taken = (item_columns.take(rescored.row_K), user_columns.take(rescored.user_K))
        num_items = len(rescored.row_K)
        return planned_table(
            {
                **{name: part[name] for part in taken for name in part.column_names},
                "rank": rescored.rank_K,
                "image_embeds": embeds_KD[rescored.row_K],
                "like_probability": rescored.like_K,
                "user_factors": None,
                "sampled_factors": None,
                "origin": np.full(num_items, schemas.CARRIED),
                "shard": np.full(num_items, NOT_RENDERED),
            },
            embed_dim,
        )

    def previous_items(self, bucket: int) -> pa.Table:
        """Return the previous items of a bucket; caches the last one, because users arrive by bucket.

        Raises DamagedFilesError for a damaged file: the run then does without it.
        """
        if self.cached_items is None or self.cached_items[0] != bucket:
            assert self.previous is not None
            num_buckets = self.config.layout.num_buckets
            try:
                items = self.previous.bucket("items", bucket, num_buckets)
            except InputError:
                rows = self.previous.bucket_files("items", bucket, num_buckets).to_pylist()
                if damaged := damage_among(self.previous.root, map(listed, rows)):
                    raise damaged_files(damaged) from None
                raise
            self.cached_items = (bucket, items)
        return self.cached_items[1]


def planned_table(columns: dict[str, Any], embed_dim: int) -> pa.Table:
    """Return a table of `schemas.plan` from its columns: arrays, lists, matrices, or None for nulls."""
    schema = schemas.plan(embed_dim)
    assert set(columns) == set(schema.names), set(columns) ^ set(schema.names)
    num_items = len(columns["item_id"])
    arrays = [arrow_column(columns[field.name], field.type, num_items) for field in schema]
    return pa.table(arrays, schema=schema)


def arrow_column(values: Any, kind: pa.DataType, num_rows: int) -> pa.Array | pa.ChunkedArray:
    """Return `values` as an Arrow column; a matrix becomes a column of lists without a copy."""
    if values is None:
        return pa.nulls(num_rows, kind)
    if isinstance(values, pa.Array | pa.ChunkedArray):
        return values
    if not isinstance(values, np.ndarray) or values.ndim == 1:
        return pa.array(values, kind)
    flat = pa.array(values.ravel())
    if pa.types.is_fixed_size_list(kind):
        return pa.FixedSizeListArray.from_arrays(flat, type=kind)
    offsets = np.arange(num_rows + 1, dtype=np.int32) * values.shape[1]
    return pa.ListArray.from_arrays(pa.array(offsets), flat)
