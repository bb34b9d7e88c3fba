"""The request: users and their numbers of items, checked against the models before a run writes anything.

request, some rows at a time -> checked; -> work/…/request/bucket-…/ -> `Request`s of one bucket
"""

import logging
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rebeca_ray import schemas
from rebeca_ray.catalog.erasure.tombstones import read_tombstones
from rebeca_ray.catalog.layout import Run
from rebeca_ray.config.fields import MAX_IMAGES
from rebeca_ray.config.jobs import GenerateConfig, SampleConfig
from rebeca_ray.config.load import parse_config
from rebeca_ray.config.sections import DiffusionSettings, PriorSampling
from rebeca_ray.data.interactions import open_interactions
from rebeca_ray.data.items import check_items_fit, open_items, read_item_ids
from rebeca_ray.data.validation import (
    MAX_EXAMPLES,
    check_columns,
    check_ids,
    check_numbers,
    check_rows,
    check_texts,
    refuse,
    row_numbers,
)
from rebeca_ray.decoder.files import DecoderIdentity
from rebeca_ray.errors import InputError, shown
from rebeca_ray.generation.context import RunContext
from rebeca_ray.identity import bucket_of, read_user_key, require_key
from rebeca_ray.prior.checkpoint import read_prior_config
from rebeca_ray.prior.schedules import check_steps
from rebeca_ray.storage.filesystem import delete, join
from rebeca_ray.storage.listing import digest_of, list_data
from rebeca_ray.storage.objects import JsonObject
from rebeca_ray.storage.parquet import ParquetInput, joined, open_parquet, read_table, replaced, write_table

log = logging.getLogger(__name__)

ROWS_AT_ONCE = 1_000_000  # of users, in memory
ROWS_PER_BATCH = 100_000  # of users, as Python objects
ROWS_PER_GROUP = 20_000
WRITERS = 16


@dataclass(frozen=True, kw_only=True)
class Request:
    """One row of the request, with the defaults filled in."""

    user_id: str
    num_images: int
    prompt: str
    negative_prompt: str
    priority: float
    item_id: str | None
    strength: float | None


def check_request(config: GenerateConfig, decoder: DecoderIdentity) -> int:
    """Validate every input of a run against the prior and the decoder. Returns the number of requested items.

    Raises InputError for a missing column, empty or repeated users, counts below 1, and a prior that draws
    embeddings of another size than the decoder reads.
    """
    prior = read_prior_config(config.prior)
    embed_dim = prior["scaler"]["embed_dim"]
    if decoder.embed_dim != embed_dim:
        raise InputError(
            f"prior {config.prior} draws embeddings of size {embed_dim}, "
            f"decoder {config.decoder.model} reads {decoder.embed_dim}; "
            "train the prior on items embedded with the decoder's CLIP"
        )
    check_prior_can(config, prior)
    if config.items is not None:
        check_items_fit(config.items, prior)
    if config.interactions is not None:
        check_columns(open_interactions(config.interactions), schemas.INTERACTIONS)

    source = open_request(config)
    columns = check_columns(source, schemas.REQUEST)
    tombstones, erased = read_tombstones(config.catalog), 0
    ids, requested, rows = np.empty(source.num_rows, np.int64), 0, 0
    try:
        for users in joined(source.batches(columns, ROWS_PER_BATCH), ROWS_AT_ONCE):
            requested += check_users(users, config)
            if tombstones and (left_out := users.filter(tombstones.rows(users))).num_rows:
                requested -= check_users(left_out, config)
                erased += left_out.num_rows
            ids[rows : rows + users.num_rows] = hashes_of(users["user_id"])
            rows += users.num_rows
    except InputError:
        check_users(source.read(columns), config, unique=True)  # the error counts the bad rows of all
        raise
    ids.sort()
    if not rows or (ids[1:] == ids[:-1]).any():
        check_users(source.read(columns), config, unique=True)
    if erased == rows:
        raise InputError(f"request {config.request}: all {rows:,} users were erased; ask for others")
    if erased:
        log.info(f"request {config.request}: {erased:,} of {rows:,} users were erased, and are left out")
    return requested


def open_request(config: GenerateConfig) -> ParquetInput:
    """Open the request. With `user_key`, every read gives pseudonyms for users."""
    return open_parquet(config.request, "request", user_key=read_user_key(config.user_key))


def hashes_of(ids: pa.ChunkedArray) -> np.ndarray:
    """Return 64 bits of each id, the same within this process."""
    parts = [np.fromiter(map(hash, chunk.to_pylist()), np.int64, len(chunk)) for chunk in ids.chunks]
    return np.concatenate(parts)


def check_users(request: pa.Table, config: GenerateConfig, *, unique: bool = False) -> int:
    """Validate rows of the request, with `unique` also that no user repeats. Returns their items.

    Raises InputError for no rows, empty users, texts and numbers that are no such, and counts below 1.
    """
    remedy = "ask for each user once" if unique else None
    check_rows(request, "request", config.request)
    check_ids(request["user_id"], "request", config.request, "user_id", unique=remedy)
    for name in request.column_names:
        if pa.types.is_string(schemas.REQUEST.field(name).type):
            check_texts(request[name], "request", config.request, name)
        if pa.types.is_floating(schemas.REQUEST.field(name).type):
            check_numbers(request[name], "request", config.request, name)
    check_variants(request, "request", config.request, config.items)
    if "num_images" not in request.column_names:
        return request.num_rows * config.num_images

    # A user without a count gets the default of the config.
    counts = request["num_images"].drop_null()
    if len(counts):
        least, most = pc.min_max(counts).as_py().values()
        if least < 1 or most > MAX_IMAGES:
            raise InputError(
                f"request {config.request}: num_images goes from {least} to {most}; "
                f"ask for 1 to {MAX_IMAGES:,} images per user"
            )
    return int(pc.sum(counts).as_py() or 0) + (request.num_rows - len(counts)) * config.num_images


def check_variants(users: pa.Table, what: str, uri: str, items: str | None) -> None:
    """Raise InputError unless each given item is among the real items, with a strength in (0, 1]."""
    nothing = pa.chunked_array([pa.nulls(users.num_rows)])
    item, strength = (
        users[name].cast(schemas.REQUEST.field(name).type) if name in users.column_names else nothing
        for name in ("item_id", "strength")
    )
    has_item, has_strength = item.is_valid(), strength.is_valid()
    without_item = pc.and_not(has_strength, has_item)
    remedy = "give both, or neither"
    refuse(what, uri, without_item, "a strength without item_id", row_numbers(without_item), remedy)
    without = pc.and_not(has_item, has_strength)
    refuse(what, uri, without, "an item_id without strength", row_numbers(without), remedy)
    if not pc.any(has_item).as_py():
        return
    inside = pc.and_(pc.greater(strength, 0), pc.less_equal(strength, 1))
    outside = pc.fill_null(pc.invert(inside), False)
    examples = ", ".join(f"{value:g}" for value in strength.filter(outside).to_pylist()[:MAX_EXAMPLES])
    refuse(what, uri, outside, "a strength outside (0, 1]", examples, "give at most 1, and more than 0")
    if items is None:
        raise InputError(
            f"{what} {uri}: {pc.sum(has_item).as_py()} of {len(item)} rows have an item_id, "
            "but `items` is not set; set it to the embedded real items, or leave item_id out"
        )
    known = pa.array(read_item_ids(open_items(items)), pa.string())
    unknown = pc.and_not(has_item, pc.is_in(item, value_set=known))
    if count := pc.sum(unknown).as_py():
        first = shown(item.filter(unknown)[0].as_py())
        raise InputError(
            f"{what} {uri}: {count} item_ids are not in items {items} (the first is {first}); "
            "give ids of real items of that table"
        )


def split_request(context: RunContext) -> None:
    """Write the request below the run's work folder, by bucket."""
    source = open_request(context.config)
    split_users(source, check_columns(source, schemas.REQUEST), context, "request")


def split_prior_users(context: RunContext) -> None:
    """Write the users of an `id` prior below the run's work folder, by bucket."""
    source = open_parquet(join(context.config.prior, "users.parquet"), "users")
    split_users(source, check_columns(source, schemas.PRIOR_USERS), context, "known")


def split_users(source: ParquetInput, columns: pa.Schema, context: RunContext, name: str) -> None:
    """Write a table of users as folders of one bucket each, with ROWS_AT_ONCE rows in memory."""
    num_buckets = context.num_buckets
    tombstones = read_tombstones(context.config.catalog)
    delete(join(context.run.work, name))  # of an attempt that was killed
    tables = joined(source.batches(columns, ROWS_PER_BATCH), ROWS_AT_ONCE)
    for number, table in enumerate(tables):
        table = tombstones.without(table) if tombstones else table
        bucket = np.array([bucket_of(user, num_buckets) for user in table["user_id"].to_pylist()], int)
        order = np.argsort(bucket, kind="stable")
        ends = np.searchsorted(bucket[order], np.arange(num_buckets + 1)).tolist()
        sorted_table = table.take(order)

        def write(
            bucket: int,
            rows: pa.Table = sorted_table,
            ends: list[int] = ends,
            file: str = f"part-{number:05d}.parquet",
        ) -> None:
            inside = rows.slice(ends[bucket], ends[bucket + 1] - ends[bucket])
            uri = join(split_folder(context.run, name, bucket), file)
            write_table(inside, uri, row_group_size=ROWS_PER_GROUP)

        with ThreadPoolExecutor(WRITERS) as pool:
            list(pool.map(write, range(num_buckets)))


def split_folder(run: Run, name: str, bucket: int) -> str:
    return join(run.work, name, f"bucket-{bucket:05d}")


def known_file(run: Run, bucket: int) -> str:
    """Return the folder with the users of a bucket that an `id` prior knows."""
    return split_folder(run, "known", bucket)


def read_requests(context: RunContext, bucket: int) -> list[Request]:
    """Return the requests of one bucket."""
    rows = read_table(split_folder(context.run, "request", bucket), "request").to_pylist()
    return [
        Request(
            user_id=row["user_id"],
            num_images=row.get("num_images") or context.config.num_images,
            prompt=row.get("prompt") or "",
            negative_prompt=row.get("negative_prompt") or "",
            priority=float(np.float32(row.get("priority") or 0.0)),  # as it is read back
            item_id=row.get("item_id"),
            strength=row.get("strength") and float(np.float32(row["strength"])),
        )
        for row in rows
    ]


def input_digests(config: GenerateConfig) -> dict[str, str]:
    """Return the digests of a run's tables, by their names."""
    digests = {"request": digest_of(list_data(config.request, "request"))}
    if key := read_user_key(config.user_key):
        digests["user_key"] = key.fingerprint
    if config.items is not None:
        digests["items"] = open_items(config.items).digest()
    if config.interactions is not None:
        digests["interactions"] = digest_of(list_data(config.interactions.path, "interactions", csv=True))
    return digests


def require_same_inputs(config: GenerateConfig, described: Mapping[str, str], action: str) -> None:
    """Raise InputError if a table is no longer the one that the run was described with."""
    for name, digest in input_digests(config).items():
        if described[name] != digest:
            section = config.interactions if name == "interactions" else None
            raise replaced(name, section.path if section else getattr(config, name), action)


def check_prior_can(config: GenerateConfig | SampleConfig, prior: JsonObject) -> None:
    """Raise InputError for settings that this prior was not trained for, and for inputs that it misses."""
    sampling = parse_config(PriorSampling, prior["sampling"], where=f"prior {config.prior}: sampling")
    try:
        sampler = config.sampler.resolve(sampling, prior["diffusion"]["num_train_timesteps"])
        if sampling.distilled_steps is None:
            steps = cast(int, sampler.num_inference_steps)
            check_steps(DiffusionSettings(**prior["diffusion"]), steps, prior["scaler"]["deviation"])
    except ValueError as error:
        raise InputError(f"prior {config.prior}: {error}") from None
    if sampler.variant == "noise" and sampling.distilled_steps is not None:
        raise InputError(
            f"sampler.variant is noise, but prior {config.prior} is distilled and denoises from its "
            f"{sampling.distilled_steps} built-in timesteps alone; set it to slerp"
        )
    if prior["network"]["user_encoder"] == "id":  # no other prior has a table of users
        require_key(f"prior {config.prior}", prior.get("user_key"), read_user_key(config.user_key))
    if cast(float, sampler.prior_guidance_scale) > 1 and prior["condition_dropout"] == 0:
        raise InputError(
            f"sampler.prior_guidance_scale is {sampler.prior_guidance_scale}, "
            f"but prior {config.prior} was trained without condition dropout and cannot be guided; "
            "set it to 1, or train with user_dropout and rating_dropout, or joint_dropout, above 0"
        )
    if config.interactions is not None and config.items is None:
        raise InputError(
            "interactions: need `items` too, for the embeddings of the rated items; set both, or neither"
        )
    if prior["network"]["user_encoder"] == "history" and config.interactions is None:
        raise InputError(
            f"prior {config.prior} knows users by their history; "
            "set `interactions` (and `items`) to all their ratings"
        )
