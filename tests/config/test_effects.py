"""Effects: every field has one mark, and the derived lists equal the literal ones that they replaced."""

import hashlib
import json
from typing import Annotated, Any

import pytest

from rebeca_ray.config import decoder, evaluation, jobs, people, sections, telemetry, verifier
from rebeca_ray.config.decoder import DecoderSettings
from rebeca_ray.config.fields import (
    NOT_IN_IDENTITY,
    NOT_SERVED,
    Effect,
    Settings,
    effect_of,
    fields_with,
    section_of,
)
from rebeca_ray.config.jobs import GenerateConfig, TrainConfig
from rebeca_ray.config.sections import InteractionSettings, SamplerSettings
from rebeca_ray.decoder.files import LOCATIONS, NOT_IN_FINGERPRINT, DecoderIdentity
from rebeca_ray.decoder.triton_client import parameters
from rebeca_ray.generation.runs import NOT_COMPARED_ON_RESUME

MODELS = [
    model
    for module in (decoder, evaluation, jobs, people, sections, telemetry, verifier)
    for model in vars(module).values()
    if isinstance(model, type) and issubclass(model, Settings) and model.__module__ == module.__name__
]
FIELDS = [(model, name) for model in MODELS for name in model.model_fields]

# The literal lists of the first version. A change here redraws catalogs, or keeps what must be redrawn.
IN_CONTENT = {
    "model",
    "revision",
    "ip_adapter",
    "ip_adapter_repo",
    "ip_adapter_revision",
    "vae",
    "lora",
    "engine_dir",
}
NOT_IN_AN_IMAGE = {
    "backend",
    "triton",
    "batch_size",
    "num_actors",
    "cpus_per_actor",
    "device",
    "thumbnail_size",
    "provenance",
    "c2pa",
    "engine",
    "compile",
}
UNKNOWN_TO_A_SERVER = {"backend", "triton", "num_actors", "cpus_per_actor", "c2pa"}
NOT_IN_A_PLAN_KEY = {"batch_size", "num_actors", "cpus_per_actor", "device", "variant"}
NOT_IN_A_RUN_NAME = {
    "interactions": {"path": True, "columns": True, "user_key": True, "until": True},
    "user_key": True,
    "items": True,
    "catalog": True,
    "log_level": True,
    "report": True,
    "out": True,
    "stall_minutes": True,
    "storage": True,
    "workers": True,
}
NOT_DESCRIBED = {
    "catalog": True,
    "user_key": True,
    "interactions": {"user_key": True, "until": True},
    "log_level": True,
    "report": True,
    "run_date": True,
    "run_id": True,
    "error_budget": True,
    "gate": True,
    "limits": True,
    "prices": True,
    "sampler": {"num_actors": True, "cpus_per_actor": True},
    "decoder": {"num_actors": True, "cpus_per_actor": True, "triton": True, "c2pa": True},
    "layout": {"images_per_file": True},
}


def marked(names: set[str]) -> dict[str, bool]:
    return dict.fromkeys(names, True)


@pytest.mark.parametrize(("model", "name"), FIELDS, ids=lambda value: getattr(value, "__name__", value))
def test_every_field_has_one_mark_and_a_description_that_reads_alone(
    model: type[Settings], name: str
) -> None:
    if section_of(model, name) is None:
        assert effect_of(model, name) in Effect
    else:
        assert not any(isinstance(mark, Effect) for mark in model.model_fields[name].metadata)
    description = " ".join((model.model_fields[name].description or "").split())
    assert len(description) >= 16
    assert description[0].isupper()
    assert description.endswith(".")


def test_every_model_has_a_summary_in_one_line() -> None:
    for model in MODELS:
        summary = (model.__doc__ or "").splitlines()[0]
        assert summary.startswith(("The ", "One ", "`rebeca "))
        assert summary.endswith(".")


@pytest.mark.parametrize(
    ("derived", "literal"),
    [
        (LOCATIONS, marked(IN_CONTENT)),
        (NOT_IN_FINGERPRINT, marked(NOT_IN_AN_IMAGE)),
        (fields_with(DecoderSettings, NOT_IN_IDENTITY), marked(IN_CONTENT | NOT_IN_AN_IMAGE)),
        (fields_with(DecoderSettings, NOT_SERVED), marked(UNKNOWN_TO_A_SERVER)),
        (fields_with(SamplerSettings, NOT_IN_IDENTITY), marked(NOT_IN_A_PLAN_KEY)),
        (fields_with(TrainConfig, NOT_IN_IDENTITY), NOT_IN_A_RUN_NAME),
        (NOT_COMPARED_ON_RESUME, NOT_DESCRIBED),
    ],
)
def test_a_derived_list_equals_the_literal_one(derived: dict[str, Any], literal: dict[str, Any]) -> None:
    assert derived == literal


def test_what_is_hashed_and_sent_is_the_same_to_the_byte() -> None:
    settings = DecoderSettings(
        model="/m", engine="onnx", engine_dir="/e", num_inference_steps=7, backend="triton", num_actors=3
    )
    chosen = settings.model_dump(exclude=IN_CONTENT | NOT_IN_AN_IMAGE)
    digest = hashlib.sha256(json.dumps([chosen, {"unet/a": "1"}], sort_keys=True).encode()).hexdigest()
    assert DecoderIdentity(embed_dim=4, weights={"unet/a": "1"}).fingerprint(settings) == digest[:16]
    sent = settings.model_dump(mode="json", exclude=UNKNOWN_TO_A_SERVER, exclude_defaults=True)
    assert parameters(settings) == {name: json.dumps(value) for name, value in sent.items()}
    sampler = SamplerSettings(name="ddim", num_actors=2)
    assert sampler.identity_json() == sampler.model_dump_json(exclude=NOT_IN_A_PLAN_KEY)
    train = TrainConfig(interactions=InteractionSettings(path="a"), items="b", out="c", preset="stickers")
    assert train.identity_json() == train.model_dump_json(exclude=NOT_IN_A_RUN_NAME)
    generate = GenerateConfig(prior="p", decoder=settings, request="r", catalog="c")
    assert generate.model_dump(exclude=NOT_COMPARED_ON_RESUME) == generate.model_dump(exclude=NOT_DESCRIBED)


def test_a_field_without_a_mark_or_with_two_is_refused() -> None:
    class Unmarked(Settings):
        size: int = 1
        twice: Annotated[int, Effect.ITEM, Effect.SPEED] = 1

    with pytest.raises(ValueError, match=r"Unmarked\.size has 0 marks; give it one Effect"):
        fields_with(Unmarked, {Effect.ITEM})
    with pytest.raises(ValueError, match=r"Unmarked\.twice has 2 marks"):
        effect_of(Unmarked, "twice")


def test_a_section_is_left_out_whole_only_if_all_of_it_is() -> None:
    class Inner(Settings):
        size: Annotated[int, Effect.ITEM] = 1
        speed: Annotated[int, Effect.SPEED] = 1

    class Outer(Settings):
        inner: Inner | None = None

    assert fields_with(Outer, {Effect.SPEED}) == {"inner": {"speed": True}}
    assert fields_with(Outer, {Effect.SPEED, Effect.ITEM}) == {"inner": True}
    assert fields_with(Outer, {Effect.PLAN}) == {}
