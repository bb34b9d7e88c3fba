"""Planning: the request's users become planned items, each with the embedding to draw. One Ray Data graph.

request -> one row an item -> embeddings from the prior -> nearest real item -> work/…/plan
"""

import hashlib
import json
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rebeca_ray import identity, schemas
from rebeca_ray.catalog.layout import Run
from rebeca_ray.checkpoint import fingerprint, load_prior, read_prior_config, read_prior_users
from rebeca_ray.config import MAX_IMAGES, GenerateConfig, SamplerSettings
from rebeca_ray.decoder_files import decoder_embed_dim
from rebeca_ray.errors import UserError, did_you_mean
from rebeca_ray.items import embedded_with, read_image_embeds
from rebeca_ray.schemas import compatible
from rebeca_ray.storage import arrow_filesystem, open_filesystem, open_table, read_table

ITEMS_A_FILE = 20_000


def check_request(config: GenerateConfig) -> int:
    """Validate the request against the prior before anything is written; returns the number of items requested.

    Raises UserError for a missing column, empty, repeated or unknown users, counts below 1, or a prior whose
    embedding size does not fit the decoder.
    """
    prior = read_prior_config(config.prior)
    embed_dim, wanted = prior["scaler"]["embed_dim"], decoder_embed_dim(config.decoder)
    if wanted != embed_dim:
        raise UserError(
            f"prior {config.prior} draws embeddings of size {embed_dim}, decoder {config.decoder.model} reads {wanted}; "
            "train the prior on items embedded with the decoder's CLIP"
        )
    check_prior_can(config, prior)
    if config.items is not None:
        check_items_fit(config.items, prior)
    _, schema = open_table(config.request, "request")
    if "user_id" not in schema.names:
        raise UserError(f"request {config.request}: column 'user_id' is missing; {did_you_mean('user_id', schema.names)}")
    request = read_table(config.request, "request", [name for name in schemas.REQUEST.names if name in schema.names])
    for name in request.column_names:
        actual, expected = schema.field(name).type, schemas.REQUEST.field(name).type
        if not compatible(actual, expected):
            raise UserError(f"request {config.request}: column {name!r} is {actual}, expected {expected}; cast it and write again")
    users = request["user_id"].cast(pa.string())
    if request.num_rows == 0:
        raise UserError(f"request {config.request}: has no rows; ask for at least one user")
    if users.null_count or pc.any(pc.equal(users, "")).as_py():
        raise UserError(
            f"request {config.request}: {users.null_count + pc.sum(pc.equal(users, '')).as_py()} rows have an empty user_id; drop them"
        )
    if len(users) != pc.count_distinct(users).as_py():
        raise UserError(
            f"request {config.request}: {len(users) - pc.count_distinct(users).as_py()} user_ids are repeated; ask for each user once"
        )
    known = read_prior_users(config.prior, prior)["user_id"]
    unknown = users.filter(pc.invert(pc.is_in(users, value_set=known.combine_chunks())))
    if len(unknown):
        names = ", ".join(repr(name) for name in unknown[:3].to_pylist())
        raise UserError(
            f"request {config.request}: {len(unknown)} of {len(users)} users are unknown to prior {config.prior} ({names}); "
            "ask for users it was trained on, or train it on interactions that hold them"
        )
    if "num_images" not in request.column_names:
        return len(users) * config.num_images
    counts = pc.fill_null(request["num_images"].cast(pa.int64()), config.num_images)
    least, most = pc.min_max(counts).as_py().values()
    if least < 1 or most > MAX_IMAGES:
        raise UserError(f"request {config.request}: num_images goes from {least} to {most}; ask for 1 to {MAX_IMAGES:,} images a user")
    return int(pc.sum(counts).as_py())


def check_prior_can(config: GenerateConfig, prior: dict[str, Any]) -> None:
    """Raise UserError for sampler settings this prior was not trained for."""
    sampler, trained_steps = config.sampler, prior["diffusion"]["num_train_timesteps"]
    if sampler.num_inference_steps > trained_steps:
        raise UserError(
            f"sampler.num_inference_steps is {sampler.num_inference_steps}, prior {config.prior} was trained on {trained_steps}; "
            "take at most that many"
        )
    if sampler.prior_guidance_scale > 1 and prior["condition_dropout"] == 0:
        raise UserError(
            f"sampler.prior_guidance_scale is {sampler.prior_guidance_scale}, but prior {config.prior} was trained without condition "
            "dropout and cannot be guided; set it to 1, or train with user_dropout and rating_dropout above 0"
        )


def check_items_fit(items: str, prior: dict[str, Any]) -> None:
    """Raise UserError for real items that the prior's embeddings cannot be compared with."""
    embed_dim, clip = embedded_with(items)
    wanted = prior["scaler"]["embed_dim"]
    if embed_dim != wanted or (clip and prior["clip"] and clip != prior["clip"]):
        raise UserError(
            f"items {items}: embeddings of size {embed_dim} by CLIP {clip}, the prior knows size {wanted} by CLIP {prior['clip']}; "
            "give the items it was trained on, or leave `items` out"
        )


def plan_items(config: GenerateConfig, run: Run, versions: dict[str, str]) -> None:
    """Write the run's plan. Every requested item becomes exactly one row.

    Raises UserError if the prior is no longer the one of `versions`.
    """
    import ray

    files, schema = open_table(config.request, "request")
    filesystem, _ = open_filesystem(config.request)
    plan_filesystem, plan_path = open_filesystem(run.plan)
    columns = [name for name in schemas.REQUEST.names if name in schema.names]
    sampler = config.sampler
    (
        ray.data.read_parquet(files, filesystem=arrow_filesystem(filesystem))
        .select_columns(columns)
        .map_batches(RequestedItems(config, versions), batch_format="pyarrow")
        .map_batches(
            SampleEmbeds,
            fn_constructor_args=(config.prior, versions["prior"], sampler),
            batch_size=sampler.batch_size,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=sampler.num_actors),
            num_cpus=sampler.cpus_per_actor,
            num_gpus=1 if sampler.device == "cuda" else 0,
        )
        .map_batches(NearestItems(config.items, run.run_id), batch_format="pyarrow")
        .write_parquet(plan_path, filesystem=arrow_filesystem(plan_filesystem), max_rows_per_file=ITEMS_A_FILE)
    )


class RequestedItems:
    """One row a user in, `num_images` rows out: `item_id`, `user_id`, `rank`, `seed`, `user_index`, `prompt`."""

    def __init__(self, config: GenerateConfig, versions: dict[str, str]) -> None:
        told = config.sampler.model_dump(exclude={"batch_size", "num_actors", "cpus_per_actor", "device"})
        self.settings = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
        self.prior_uri, self.num_images = config.prior, config.num_images
        self.prior, self.decoder = versions["prior"], versions["decoder"]

    def __call__(self, batch: pa.Table) -> pa.Table:
        users = known_users(self.prior_uri, self.prior)
        rows: list[dict[str, Any]] = []
        for asked in batch.to_pylist():
            user_index, history_digest = users[asked["user_id"]]
            key = identity.plan_key(
                prior=self.prior, settings=self.settings, user_id=asked["user_id"], history_digest=history_digest, generation=0
            )
            prompt = asked.get("prompt") or ""
            for candidate in range(asked.get("num_images") or self.num_images):
                rows.append(
                    {
                        "item_id": identity.item_id(key, candidate, self.decoder + prompt),
                        "user_id": asked["user_id"],
                        "rank": candidate,
                        "seed": str(identity.candidate_seed(key, candidate)),
                        "user_index": user_index,
                        "prompt": prompt,
                    }
                )
        return pa.Table.from_pylist(rows)


@lru_cache(maxsize=1)
def known_users(uri: str, version: str) -> dict[str, tuple[int, str]]:
    """`user_id` -> (`user_index`, `history_digest`) of one version of a prior, read once a process."""
    config = read_prior_config(uri)
    require_version(uri, fingerprint(config), version)
    table = read_prior_users(uri, config)
    return {row["user_id"]: (row["user_index"], row["history_digest"]) for row in table.to_pylist()}


def require_version(prior: str, found: str, version: str) -> None:
    """Raise UserError if another prior lies where the run's own lay when it began."""
    if found != version:
        raise UserError(f"prior {prior}: was replaced while this run was planning; run again")


class SampleEmbeds:
    """One row in, the same row out with `image_embeds` drawn from the prior (rounded to half precision)."""

    def __init__(self, prior: str, version: str, sampler: SamplerSettings) -> None:
        from rebeca_ray.diffusion import Diffusion

        self.prior, self.sampler = load_prior(prior, sampler.device), sampler
        require_version(prior, self.prior.fingerprint, version)
        self.diffusion = Diffusion.build(self.prior.diffusion, sampler.device)

    def __call__(self, batch: pa.Table) -> pa.Table:
        from rebeca_ray.sampling import sample_liked

        seeds = [int(seed) for seed in batch["seed"].to_pylist()]
        users = batch["user_index"].to_pylist()
        padding = self.sampler.batch_size - len(seeds)  # one tile size, so that bits do not depend on company
        x0 = sample_liked(
            self.prior.network,
            self.diffusion,
            [*users, *users[:1] * padding],
            [*seeds, *seeds[:1] * padding],
            sampler=self.sampler.name,
            num_inference_steps=self.sampler.num_inference_steps,
            guidance_scale=self.sampler.prior_guidance_scale,
            device=self.sampler.device,
        )[: len(seeds)]
        embeds = self.prior.scaler.unscale(x0).numpy().astype(np.float16).astype(np.float32)
        column = pa.FixedSizeListArray.from_arrays(pa.array(embeds.ravel()), type=schemas.image_embeds(embeds.shape[1]))
        return batch.drop_columns(["seed", "user_index"]).append_column("image_embeds", column)


class NearestItems:
    """One row in, the same row out with the nearest real item by cosine (nulls if no items are given).

    Brute force in batches: one matrix product of B x D by D x I.
    """

    def __init__(self, items: str | None, run_id: str) -> None:
        self.items, self.run_id = items, run_id

    def __call__(self, batch: pa.Table) -> pa.Table:
        embeds = batch["image_embeds"].combine_chunks()
        if self.items is None:
            nearest, similarity = pa.nulls(batch.num_rows, pa.string()), pa.nulls(batch.num_rows, pa.float32())
        else:
            item_id, unit_ID = unit_embeds(self.items, self.run_id)
            values = embeds.flatten().to_numpy().reshape(batch.num_rows, -1)
            cosine_BI = values / np.linalg.norm(values, axis=1, keepdims=True) @ unit_ID.T
            nearest, similarity = item_id.take(pa.array(cosine_BI.argmax(axis=1))), pa.array(cosine_BI.max(axis=1).astype(np.float32))
        schema = schemas.plan(embeds.type.list_size)
        columns = {"nearest_item_id": nearest, "nearest_similarity": similarity}
        return pa.table([columns[name] if name in columns else batch[name] for name in schema.names], names=schema.names).cast(schema)


@lru_cache(maxsize=1)
def unit_embeds(items: str, run_id: str) -> tuple[pa.Array, np.ndarray]:
    """Ids and unit embeddings of the real items, read once a process and run."""
    found = read_image_embeds(items)
    return pa.array(found.item_id), found.image_embeds / np.linalg.norm(found.image_embeds, axis=1, keepdims=True)
