"""Variants of given items in a request: beside plain users, night after night, and each mistake."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rebeca_ray.catalog.manifest import Manifest
from rebeca_ray.catalog.read import Snapshot, read_catalog
from rebeca_ray.catalog.verify import verify
from rebeca_ray.cli.commands import app
from rebeca_ray.config.jobs import GenerateConfig, SampleConfig
from rebeca_ray.config.sections import PriorSampling, SelectionSettings
from rebeca_ray.data.items import read_image_embeds
from rebeca_ray.decoder.files import identify_decoder
from rebeca_ray.errors import InputError
from rebeca_ray.generation.request import check_request
from rebeca_ray.halves.sample import sample_embeddings
from rebeca_ray.prior.checkpoint import load_prior, save_prior
from rebeca_ray.prior.selector import Selector
from rebeca_ray.storage.parquet import read_table
from tests.conftest import USERS, D, plan, snapshot_of, write_tiny_prior
from tests.generation.test_nights import by_user, change_digest, counts, request_for

PLAIN, ANN, BOB, STRANGER = USERS[0], USERS[1], USERS[2], "stranger"
METHODS = ("slerp", "noise")


def by_method(config: GenerateConfig, method: str) -> GenerateConfig:
    sampler = config.sampler.model_copy(update={"variant": method})
    return config.model_copy(update={"sampler": sampler})


def request_of(**rows: tuple[str, float] | None) -> pa.Table:
    """Return a request; an underscore in a name stands for a hyphen."""
    item, strength = zip(*(row or (None, None) for row in rows.values()), strict=True)
    columns = {"user_id": [name.replace("_", "-") for name in rows], "item_id": pa.array(item, pa.string())}
    return pa.table(columns | {"strength": pa.array(strength, pa.float64())})


def rows_of(planned: pa.Table, user: str) -> list[dict[str, Any]]:
    return [row for row in planned.to_pylist() if row["user_id"] == user]


def cosines(config: GenerateConfig, rows: list[dict[str, Any]], item: str) -> np.ndarray:
    """Return the cosine of each row's embedding to a real item."""
    items = read_image_embeds(str(config.items))
    given = items.image_embeds[items.item_id.tolist().index(item)]
    embeds = np.array([row["image_embeds"] for row in rows])
    return np.asarray(embeds @ given / np.linalg.norm(embeds, axis=1) / np.linalg.norm(given))


@pytest.mark.parametrize("method", METHODS)
def test_a_variant_beside_plain_users_changes_nothing_for_them(config: GenerateConfig, method: str) -> None:
    write_tiny_prior(Path(config.prior).parent, selector=Selector(D, num_factors=4))
    config = by_method(config, method)
    before = plan(config, pa.table({"user_id": [PLAIN, ANN, BOB, STRANGER]}))
    request = request_of(user_0=None, user_1=("real-4", 0.05), user_2=("real-5", 1.0), stranger=None)
    after = plan(config, request)
    for user in (PLAIN, ""):
        assert rows_of(after, user) == rows_of(before, user)
    assert len(rows_of(after, "")) == 3
    for user in (ANN, BOB):
        variants, plain = rows_of(after, user), rows_of(before, user)
        assert [row["rank"] for row in variants] == [0, 1, 2]
        assert not {row["item_id"] for row in variants} & {row["item_id"] for row in plain}
        assert all(0 < row["like_probability"] < 1 for row in variants)
    # The quality gate tests the prior, so it reads plain users alone.
    assert {row["user_id"] for row in after.to_pylist() if row["user_factors"] is None} == {ANN, BOB}
    assert all(len(row["user_factors"]) == 5 for row in rows_of(after, PLAIN))
    # Each alone is the same as in company.
    assert rows_of(plan(config, request.slice(1, 1)), ANN) == rows_of(after, ANN)


def test_a_weak_variant_is_near_its_item_although_copies_come_last(config: GenerateConfig) -> None:
    rows = rows_of(plan(config, request_of(user_1=("real-4", 0.05))), ANN)
    assert (cosines(config, rows, "real-4") > config.selection.max_item_similarity).all()
    assert {row["nearest_item_id"] for row in rows} == {"real-4"}
    weak, strong = (
        cosines(config, rows_of(plan(config, request_of(user_1=("real-4", strength))), ANN), "real-4")
        for strength in (0.3, 0.9)
    )
    assert weak.min() > strong.max()


def test_a_cold_start_user_with_an_item_gets_a_variant_for_the_population(config: GenerateConfig) -> None:
    planned = plan(config, request_of(stranger=("real-4", 0.1), nobody=None))
    assert {row["origin"] for row in planned.to_pylist()} == {"population"}
    assert sorted({row["user_id"] for row in planned.to_pylist()}) == ["", STRANGER]
    assert (cosines(config, rows_of(planned, STRANGER), "real-4") > 0.9).all()


def night(config: GenerateConfig, number: int, **rows: tuple[str, float] | None) -> tuple[Manifest, Snapshot]:
    request = request_of(**rows)
    columns = {name: request[name] for name in ("item_id", "strength")}
    manifest = snapshot_of(request_for(config, request["user_id"].to_pylist(), number, **columns))
    snapshot = read_catalog(config.catalog)
    assert verify(snapshot, "full") == []
    return manifest, snapshot


def test_a_variant_is_carried_until_item_strength_method_or_history_changes(config: GenerateConfig) -> None:
    first, snapshot = night(config, 0, user_0=None, user_1=("real-4", 0.3), stranger=("real-4", 0.3))
    assert counts(first, "requested", "new", "population", "failed") == (9, 6, 3, 0)
    known = [by_user(snapshot)]
    second, snapshot = night(config, 1, user_0=None, user_1=("real-4", 0.3), stranger=("real-4", 0.3))
    assert second.decisions.planned_items == 0
    assert by_user(snapshot) == known[0]

    changed_method = by_method(config, "noise")
    for number, (changed, row) in enumerate(
        [(config, ("real-4", 0.4)), (config, ("real-5", 0.4)), (changed_method, ("real-5", 0.4))], 2
    ):
        manifest, snapshot = night(changed, number, user_0=None, user_1=row)
        items = by_user(snapshot)
        assert manifest.decisions.planned_users == 1
        assert items[PLAIN] == known[0][PLAIN]
        assert not any(set(items[ANN]) & set(earlier[ANN]) for earlier in known)
        known.append(items)
    change_digest(config, ANN)
    manifest, snapshot = night(changed_method, 5, user_0=None, user_1=("real-5", 0.4))
    assert manifest.decisions.planned_users == 1
    # Without an item again, the user gets plain items.
    _, plain = night(config, 6, user_0=None, user_1=None)
    assert by_user(plain)[PLAIN] == known[0][PLAIN]
    assert not set(by_user(plain)[ANN]) & set(by_user(snapshot)[ANN])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            {"a": ("real-1", 0.5), "b": ("no such", 0.5), "c": ("", 0.5)},
            "2 item_ids are not in items {items} (the first is 'no such'); give ids of real items of",
        ),
        ({"a": ("real-1", 0.0)}, "1 of 1 rows have a strength outside (0, 1] (0); give at most 1, and more"),
        (
            {"a": ("real-1", -0.5), "b": ("real-1", 1.5)},
            "2 of 2 rows have a strength outside (0, 1] (-0.5, 1.5); ",
        ),
        ({"a": ("real-1", float("nan"))}, "1 of 1 rows have a strength that is not below"),
        ({"a": ("real-1", 1e-50)}, "1 of 1 rows have a strength outside (0, 1] (0); "),  # 0 in float32
        ({"b": None, "a": (None, 0.5)}, "1 of 2 rows have a strength without item_id (rows 1); give both"),
        ({"a": ("real-1", None)}, "1 of 1 rows have an item_id without strength (rows 0); give both, or"),
    ],
)
@pytest.mark.parametrize("what", ["request", "users"])
def test_a_mistake_in_a_variant_is_refused(
    config: GenerateConfig, rows: dict[str, Any], message: str, what: str
) -> None:
    pq.write_table(request_of(**rows), config.request)
    expected = message.format(items=config.items)
    checks = {
        "request": lambda: check_request(config, identify_decoder(config.decoder)),
        "users": lambda: sample_embeddings(sampling(config)),
    }
    with pytest.raises(InputError) as caught:
        checks[what]()
    assert str(caught.value).startswith(f"{what} {config.request}: {expected}"), str(caught.value)


def test_a_variant_needs_the_real_items(config: GenerateConfig) -> None:
    pq.write_table(request_of(a=("real-1", 0.5), b=None), config.request)
    with pytest.raises(InputError, match="1 of 2 rows have an item_id, but `items` is not set; set it to"):
        check_request(config.model_copy(update={"items": None}), identify_decoder(config.decoder))
    pq.write_table(request_of(a=None), config.request)
    check_request(config.model_copy(update={"items": None}), identify_decoder(config.decoder))


def test_a_column_without_the_other_is_refused(config: GenerateConfig) -> None:
    for name, message in (("item_id", "an item_id without strength"), ("strength", "a strength without")):
        pq.write_table(request_of(a=("real-1", 0.5)).select(["user_id", name]), config.request)
        with pytest.raises(InputError, match=message):
            check_request(config, identify_decoder(config.decoder))


def test_a_distilled_prior_has_no_partial_noise(config: GenerateConfig) -> None:
    sampling = PriorSampling(prior_guidance_scale=1.0, distilled_steps=4)
    save_prior(replace(load_prior(config.prior), sampling=sampling), config.prior)
    config = config.model_copy(update={"sampler": type(config.sampler)()})
    check_request(config, identify_decoder(config.decoder))
    with pytest.raises(InputError, match=r"sampler\.variant is noise, but prior .* 4 built-in timesteps"):
        check_request(by_method(config, "noise"), identify_decoder(config.decoder))


def sampling(config: GenerateConfig) -> SampleConfig:
    folder = Path(config.prior).parent
    return SampleConfig(
        prior=config.prior,
        users=config.request,
        out=str(folder / "embeddings.parquet"),
        items=config.items,
        storage=str(folder / "histories"),
        sampler=config.sampler,
        selection=SelectionSettings(candidates_per_item=2),
        num_images=config.num_images,
    )


@pytest.mark.parametrize("method", METHODS)
def test_sampling_alone_gives_the_variants_of_planning(config: GenerateConfig, method: str) -> None:
    write_tiny_prior(Path(config.prior).parent, selector=Selector(D, num_factors=4))
    request = request_of(
        user_0=None, user_1=("real-4", 0.3), stranger=("real-5", 0.7), nobody=None, user_2=("real-4", 0.3)
    )
    pq.write_table(request, config.request)
    config = by_method(config, method)
    sample = sampling(config)
    sampled = sample_embeddings(sample)
    assert (sampled.users, sampled.cold_start_users) == (5, 1)
    planned = plan(config.model_copy(update={"selection": sample.selection}), request).to_pylist()
    expected = {(row["user_id"] or "nobody", row["rank"]): row["image_embeds"] for row in planned}
    rows = read_table(sample.out, "out").to_pylist()
    assert {(row["user_id"], row["rank"]): row["image_embeds"] for row in rows} == expected


def test_the_command_ends_with_code_2(config: GenerateConfig, capsys: pytest.CaptureFixture[str]) -> None:
    pq.write_table(request_of(a=("unknown", 0.5)), config.request)
    out = str(Path(config.request).parent / "e.parquet")
    words = ["sample", "--prior", config.prior, "--users", config.request, "--out", out]
    with pytest.raises(SystemExit) as caught:
        app([*words, f"items={config.items}"])
    assert caught.value.code == 2
    assert "1 item_ids are not in items" in capsys.readouterr().err.replace("\n", " ")
