"""The request: who gets how many items, checked against the models before anything is written."""

from typing import Any, cast

import pyarrow as pa
import pyarrow.compute as pc

from rebeca_ray import schemas
from rebeca_ray.config.fields import MAX_IMAGES
from rebeca_ray.config.jobs import GenerateConfig
from rebeca_ray.config.load import parse_config
from rebeca_ray.config.sections import PriorSampling
from rebeca_ray.data.items import check_items_fit
from rebeca_ray.data.validation import check_columns, check_ids, check_numbers, check_rows, check_texts, plain
from rebeca_ray.decoder.files import DecoderIdentity
from rebeca_ray.errors import InputError
from rebeca_ray.prior.checkpoint import read_prior_config
from rebeca_ray.storage.parquet import read_table


def check_request(config: GenerateConfig, decoder: DecoderIdentity) -> int:
    """Validate the request against the prior before anything is written; returns the number of items requested.

    Raises UserError for a missing column, empty or repeated users, counts below 1, or a prior whose
    embedding size does not fit the decoder.
    """
    prior = read_prior_config(config.prior)
    embed_dim, wanted = prior["scaler"]["embed_dim"], decoder.embed_dim
    if wanted != embed_dim:
        raise InputError(
            f"prior {config.prior} draws embeddings of size {embed_dim}, decoder {config.decoder.model} reads {wanted}; "
            "train the prior on items embedded with the decoder's CLIP"
        )
    check_prior_can(config, prior)
    if config.items is not None:
        check_items_fit(config.items, prior)
    if config.interactions is not None:
        check_columns(config.interactions.path, "interactions", schemas.INTERACTIONS)
    request = read_table(config.request, "request", check_columns(config.request, "request", schemas.REQUEST))
    check_rows(request, "request", config.request)
    check_ids(request["user_id"], "request", config.request, "user_id", unique="ask for each user once")
    for name in request.column_names:
        if pa.types.is_string(schemas.REQUEST.field(name).type):
            check_texts(request[name], "request", config.request, name)
        if pa.types.is_floating(schemas.REQUEST.field(name).type):
            check_numbers(request[name], "request", config.request, name)
    if "num_images" not in request.column_names:
        return request.num_rows * config.num_images
    own = plain(request["num_images"]).drop_null()
    if len(own):
        least, most = pc.min_max(own).as_py().values()
        if least < 1 or most > MAX_IMAGES:
            raise InputError(
                f"request {config.request}: num_images goes from {least} to {most}; ask for 1 to {MAX_IMAGES:,} images a user"
            )
    return int(pc.sum(own).as_py() or 0) + (request.num_rows - len(own)) * config.num_images


def check_prior_can(config: GenerateConfig, prior: dict[str, Any]) -> None:
    """Raise UserError for what this prior was not trained for, or cannot do without more input."""
    sampling = parse_config(PriorSampling, prior["sampling"], where=f"prior {config.prior}: sampling")
    try:
        sampler = config.sampler.resolve(sampling, prior["diffusion"]["num_train_timesteps"])
    except ValueError as error:
        raise InputError(f"prior {config.prior}: {error}") from None
    if cast(float, sampler.prior_guidance_scale) > 1 and prior["condition_dropout"] == 0:
        raise InputError(
            f"sampler.prior_guidance_scale is {sampler.prior_guidance_scale}, but prior {config.prior} was trained without condition "
            "dropout and cannot be guided; set it to 1, or train with user_dropout and rating_dropout above 0"
        )
    if config.interactions is not None and config.items is None:
        raise InputError(
            "interactions: need `items` too, where the embeddings of what was rated are; set both, or neither"
        )
    if prior["network"]["user_encoder"] == "history" and config.interactions is None:
        raise InputError(
            f"prior {config.prior} knows users by their history: set `interactions` (and `items`) to what they rated until now"
        )
