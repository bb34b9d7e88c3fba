"""The request: users and their numbers of items, checked against the models before a run writes anything."""

from collections.abc import Mapping
from typing import cast

import pyarrow as pa
import pyarrow.compute as pc

from rebeca_ray import schemas
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
from rebeca_ray.prior.checkpoint import read_prior_config
from rebeca_ray.prior.schedules import check_steps
from rebeca_ray.storage.listing import digest_of, list_data
from rebeca_ray.storage.objects import JsonObject
from rebeca_ray.storage.parquet import open_parquet, replaced


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

    source = open_parquet(config.request, "request")
    request = source.read(check_columns(source, schemas.REQUEST))
    check_rows(request, "request", config.request)
    check_ids(request["user_id"], "request", config.request, "user_id", unique="ask for each user once")
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


def input_digests(config: GenerateConfig) -> dict[str, str]:
    """Return the digests of a run's tables, by their names."""
    digests = {"request": digest_of(list_data(config.request, "request"))}
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
