"""Plan: users become planned items, each with the embedding to decode. One Ray Data graph.

decisions, bucket by bucket -> candidates from the prior -> selector, nearest real item -> the best ->
work/…/plan

Shapes: G users, N candidates of all of them, K planned items, D embed dim, F factors of the selector, I real
items.
"""

import hashlib
import logging
import time
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
import torch.nn.functional as F

from rebeca_ray import identity, schemas
from rebeca_ray.catalog.layout import Run
from rebeca_ray.catalog.read import Snapshot
from rebeca_ray.config.jobs import GenerateConfig, SampleConfig
from rebeca_ray.config.sections import SamplerSettings
from rebeca_ray.data.feedback import find_rated
from rebeca_ray.data.histories import Histories, build_histories
from rebeca_ray.data.items import embedded_with, open_items, read_image_embeds, read_item_ids
from rebeca_ray.errors import InputError, ResumableError
from rebeca_ray.generation.context import RunContext
from rebeca_ray.generation.dataflow import Actors, Stage, run_graph
from rebeca_ray.generation.decisions import Action, Decisions, render_keys, shards_of
from rebeca_ray.generation.parts import PartRecord, WriteParts, with_busy_seconds
from rebeca_ray.generation.progress import Progress
from rebeca_ray.generation.sharing.planned import share_images
from rebeca_ray.generation.user_loader import UserLoader
from rebeca_ray.prior.candidates import (
    choose_candidates,
    judge_candidates,
    rescore_items,
    sample_candidates,
)
from rebeca_ray.prior.checkpoint import load_prior
from rebeca_ray.prior.diffusion import Diffusion
from rebeca_ray.storage.filesystem import delete, join
from rebeca_ray.storage.parquet import replaced, write_table
from rebeca_ray.storage.records import damage_among, damaged_files, listed, read_record, write_record
from rebeca_ray.telemetry import metrics
from rebeca_ray.watchdog import Activity

log = logging.getLogger(__name__)

ITEMS_PER_FILE = 20_000
TILES_PER_BATCH = 4  # several tiles of the sampler per batch, so that padding costs little
BATCHES_PER_BLOCK = 16  # a second of a GPU; a block costs the driver 20 ms
NOT_RENDERED = -1  # the shard of a rescored item, which has its image already


def plan_items(
    context: RunContext, histories: Histories | None, decisions: Decisions, progress: Progress
) -> None:
    """Write the run's plan, `shard=<s>/bucket=<b>/`. Every item of a planned user becomes exactly one row.

    A complete plan is never made again: a resumed run reads it, if it is intact. Raises InputError if the
    prior was replaced meanwhile, ResumableError for a plan that lacks rows.
    """
    run, config = context.run, context.config
    if has_plan(run, decisions):
        return
    for folder in (run.plan, join(run.work, "shards")):
        delete(folder)  # of an attempt that died, or of a plan that differs
    files = [join(run.work, file.path) for file in decisions.to_plan]
    rescored_from = context.previous if decisions.rescored_items else None
    planner = Stage(
        name=metrics.Stage.PLAN,
        work=PlanUsers,
        # Each actor gets a copy of these, so without the long lists of files.
        arguments=(
            config,
            context.versions,
            histories,
            rescored_from and rescored_from.only("items"),
            replace(decisions, files=[], damaged={}),
            context.inputs.get("items"),
        ),
        batch_size=users_per_batch(config),
        rows_per_block=BATCHES_PER_BLOCK * users_per_batch(config),
        actors=Actors(
            count=config.sampler.num_actors,
            cpus=config.sampler.cpus_per_actor,
            gpus=1 if config.sampler.device == "cuda" else 0,
        ),
    )
    writer = WriteParts(
        root=run.work,
        folder="plan",
        by=("shard", "bucket"),
        fencing_token=run.fencing_token,
        row_group_size=ITEMS_PER_FILE,
    )
    records: list[PartRecord] = []
    if files:
        stages = [planner, Stage(work=writer, batch_size=ITEMS_PER_FILE)]
        pulse = None if context.in_process else progress.listen()
        batches = run_graph(files, stages, in_process=context.in_process, pulse=pulse)
        total = decisions.planned_items + decisions.rescored_items
        records = progress.follow("plan", batches, total=total, actors=config.sampler.num_actors)
    if problem := missing_rows(records, decisions):
        raise ResumableError(f"run {run.run_id}: {problem}; nothing is published, start it again to resume")
    records = share_images(context, decisions, records, progress, ITEMS_PER_FILE)
    write_record(
        {"decisions": decisions.fingerprint(), "parts": [asdict(record) for record in records]},
        run.plan_marker,
    )


def has_plan(run: Run, decisions: Decisions) -> bool:
    """Return whether the run has a complete and intact plan of these decisions."""
    values = read_record(run.plan_marker)
    if values is None or values["decisions"] != decisions.fingerprint():
        return False
    parts = read_plan(run)
    problem = missing_rows(parts, decisions)
    for path, reason in damage_among(run.work, parts).items():
        problem = f"{join(run.work, path)}: {reason}"
    if problem:
        log.warning(f"{problem}; all items are planned again")
    return problem is None


def missing_rows(parts: list[PartRecord], decisions: Decisions) -> str | None:
    """Return the difference between the rows of a plan and the items that were decided on; None if equal."""
    rows = {NOT_RENDERED: 0, 0: 0}
    for part in parts:
        rows[part.shard if part.shard == NOT_RENDERED else 0] += part.rows
    expected = {NOT_RENDERED: decisions.rescored_items, 0: decisions.planned_items}
    if rows == expected:
        return None
    return (
        f"the plan has {rows[0]:,} new and {rows[NOT_RENDERED]:,} rescored items, "
        f"expected {expected[0]:,} and {expected[NOT_RENDERED]:,}"
    )


def read_plan(run: Run) -> list[PartRecord]:
    """Return the records of a complete plan. Raises ResumableError without one."""
    values = read_record(run.plan_marker)
    if values is None:
        raise ResumableError(f"{run.plan_marker}: is missing or damaged; expected the plan; start again")
    return [PartRecord.from_dict(part) for part in values["parts"]]


def users_per_batch(config: GenerateConfig | SampleConfig) -> int:
    candidates_per_user = config.num_images * config.selection.candidates_per_item
    return max(1, TILES_PER_BATCH * config.sampler.batch_size // candidates_per_user)


def settings_of_key(config: GenerateConfig | SampleConfig, sampler: SamplerSettings) -> str:
    """Return the digest of the settings in a plan key. `sampler` is the resolved one of the config."""
    text = sampler.identity_json() + config.selection.identity_json()
    if config.interactions is not None:
        text += config.interactions.hidden_shares(hide_hold_out=config.hide_hold_out)
    return hashlib.sha256(text.encode()).hexdigest()


def plan_keys(users: pa.Table, prior: str, settings: str, method: str) -> list[str]:
    """Return the plan keys of rows of `schemas.DECISIONS`. They seed the noise of the users' candidates.

    `method` is `sampler.variant`: a part of the keys of users with an item.
    """
    names = ("user_id", "history_digest", "generation", "item_id", "strength")
    return [
        identity.plan_key(
            prior=prior,
            settings=identity.settings_for_item(settings, item, strength, method),
            user_id=user,
            history_digest=digest,
            generation=generation,
        )
        for user, digest, generation, item, strength in zip(
            *(users[name].to_pylist() for name in names), strict=True
        )
    ]


def request_histories(config: GenerateConfig, run: Run, activity: Activity | None = None) -> Histories | None:
    """Return all ratings of the users, in parts of the catalog's buckets.

    Returns None if the config gives no interactions. Generated items that were rated are numbered after the
    real ones. Progress is noted in `activity`.
    """
    if config.interactions is None or config.items is None:
        return None
    everything = config.interactions.for_serving(hide_hold_out=config.hide_hold_out)
    items = open_items(config.items)
    item_id, rated_id, rated_uri = read_item_ids(items), np.array([], object), None
    generated = find_rated(config.catalog, config.interactions, item_id, *embedded_with(items))
    if generated.num_rows:
        rated_id = generated["item_id"].to_numpy(zero_copy_only=False)
        rated_uri = join(run.work, "rated.parquet")
        write_table(generated, rated_uri, row_group_size=ITEMS_PER_FILE, embed_column="image_embeds")
    histories = build_histories(
        everything,
        np.concatenate([item_id, rated_id]),
        run.work,
        multiple_of=config.layout.num_buckets,
        activity=activity,
        catalog=config.catalog,
    )
    return replace(histories, rated=rated_uri)


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
