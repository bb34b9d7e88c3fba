"""Planning: the request's users become planned items, each with the embedding to draw. One Ray Data graph.

request -> one row an item -> embeddings from the prior -> nearest real item -> work/…/plan
"""

import hashlib
import json
from functools import cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rebeca_ray import identity, schemas
from rebeca_ray.catalog.layout import Run
from rebeca_ray.checkpoint import fingerprint, load_prior, read_prior_config
from rebeca_ray.config import GenerateConfig, SamplerSettings
from rebeca_ray.decoding import decoder_embed_dim, decoder_fingerprint
from rebeca_ray.errors import UserError, did_you_mean
from rebeca_ray.items import read_image_embeds
from rebeca_ray.storage import arrow_filesystem, join, open_filesystem, open_table, read_table

ITEMS_A_FILE = 20_000


def check_request(config: GenerateConfig) -> int:
    """Validate the request against the prior before anything is written; returns the number of items requested.

    Raises UserError for a missing column, empty, repeated or unknown users, counts below 1, or a prior whose
    embedding size does not fit the decoder.
    """
    prior = read_prior_config(config.prior)
    embed_dim, wanted = prior["scaler"]["embed_dim"], decoder_embed_dim(config.decoder)
    if wanted is not None and wanted != embed_dim:
        raise UserError(
            f"prior {config.prior} draws embeddings of size {embed_dim}, decoder {config.decoder.model} reads {wanted}; "
            "train the prior on items embedded with the decoder's CLIP"
        )
    _, schema = open_table(config.request, "request")
    if "user_id" not in schema.names:
        raise UserError(f"request {config.request}: column 'user_id' is missing; {did_you_mean('user_id', schema.names)}")
    request = read_table(config.request, "request", [name for name in schemas.REQUEST.names if name in schema.names])
    users = request["user_id"]
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
    known = read_table(join(config.prior, "users.parquet"), "prior", ["user_id"])["user_id"]
    unknown = users.filter(pc.invert(pc.is_in(users, value_set=known.combine_chunks())))
    if len(unknown):
        names = ", ".join(repr(name) for name in unknown[:3].to_pylist())
        raise UserError(
            f"request {config.request}: {len(unknown)} of {len(users)} users are unknown to prior {config.prior} ({names}); "
            "ask for users it was trained on, or train it on interactions that hold them"
        )
    if "num_images" not in request.column_names:
        return len(users) * config.num_images
    counts = pc.fill_null(request["num_images"], config.num_images)
    if pc.min(counts).as_py() < 1:
        raise UserError(f"request {config.request}: num_images goes down to {pc.min(counts).as_py()}; ask for at least 1 image a user")
    return int(pc.sum(counts).as_py())


def plan_items(config: GenerateConfig, run: Run) -> None:
    """Write the run's plan. Every requested item becomes exactly one row."""
    import ray

    files, schema = open_table(config.request, "request")
    filesystem, _ = open_filesystem(config.request)
    plan_filesystem, plan_path = open_filesystem(run.plan)
    columns = [name for name in schemas.REQUEST.names if name in schema.names]
    sampler = config.sampler
    (
        ray.data.read_parquet(files, filesystem=arrow_filesystem(filesystem), columns=columns)
        .map_batches(RequestedItems(config), batch_format="pyarrow")
        .map_batches(
            SampleEmbeds,
            fn_constructor_args=(config.prior, sampler),
            batch_size=sampler.batch_size,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=sampler.num_actors),
            num_cpus=sampler.cpus_per_actor,
            num_gpus=1 if sampler.device == "cuda" else 0,
        )
        .map_batches(NearestItems(config.items), batch_format="pyarrow")
        .write_parquet(plan_path, filesystem=arrow_filesystem(plan_filesystem), max_rows_per_file=ITEMS_A_FILE)
    )


class RequestedItems:
    """One row a user in, `num_images` rows out: `item_id`, `user_id`, `rank`, `seed`, `user_index`, `prompt`."""

    def __init__(self, config: GenerateConfig) -> None:
        told = config.sampler.model_dump(exclude={"batch_size", "num_actors", "cpus_per_actor", "device"})
        self.settings = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
        self.prior_uri, self.prior = config.prior, fingerprint(read_prior_config(config.prior))
        self.decoder, self.num_images = decoder_fingerprint(config.decoder), config.num_images

    def __call__(self, batch: pa.Table) -> pa.Table:
        users = known_users(self.prior_uri)
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


@cache
def known_users(prior: str) -> dict[str, tuple[int, str]]:
    """`user_id` -> (`user_index`, `history_digest`), read once a process."""
    table = read_table(join(prior, "users.parquet"), "prior")
    return {row["user_id"]: (row["user_index"], row["history_digest"]) for row in table.to_pylist()}


class SampleEmbeds:
    """One row in, the same row out with `image_embeds` drawn from the prior (rounded to half precision)."""

    def __init__(self, prior: str, sampler: SamplerSettings) -> None:
        from rebeca_ray.diffusion import Diffusion

        self.prior, self.sampler = load_prior(prior, sampler.device), sampler
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

    def __init__(self, items: str | None) -> None:
        self.items = items

    def __call__(self, batch: pa.Table) -> pa.Table:
        embeds = batch["image_embeds"].combine_chunks()
        if self.items is None:
            nearest, similarity = pa.nulls(batch.num_rows, pa.string()), pa.nulls(batch.num_rows, pa.float32())
        else:
            item_id, unit_ID = unit_embeds(self.items)
            values = embeds.flatten().to_numpy().reshape(batch.num_rows, -1)
            cosine_BI = values / np.linalg.norm(values, axis=1, keepdims=True) @ unit_ID.T
            nearest, similarity = item_id.take(pa.array(cosine_BI.argmax(axis=1))), pa.array(cosine_BI.max(axis=1).astype(np.float32))
        schema = schemas.plan(embeds.type.list_size)
        columns = {"nearest_item_id": nearest, "nearest_similarity": similarity}
        return pa.table([columns[name] if name in columns else batch[name] for name in schema.names], names=schema.names).cast(schema)


@cache
def unit_embeds(items: str) -> tuple[pa.Array, np.ndarray]:
    """Ids and unit embeddings of the real items, read once a process."""
    found = read_image_embeds(items)
    return pa.array(found.item_id), found.image_embeds / np.linalg.norm(found.image_embeds, axis=1, keepdims=True)
