"""Pseudonyms: with a key, no user id is in a catalog, a prior, an export or a log."""

import hashlib
import json
import logging
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from typer.testing import CliRunner

from rebeca_ray.catalog.erasure.tombstones import KEY
from rebeca_ray.catalog.exports.image_objects import export_images
from rebeca_ray.catalog.exports.key_values import export_key_values
from rebeca_ray.catalog.lease import hold_lease
from rebeca_ray.catalog.read import read_catalog
from rebeca_ray.cli.commands import app
from rebeca_ray.config.jobs import GenerateConfig, SampleConfig, TrainConfig
from rebeca_ray.config.sections import GateSettings, InteractionSettings
from rebeca_ray.data.histories import build_histories, user_table
from rebeca_ray.errors import InputError, QualityGateError
from rebeca_ray.forget import Places, forget
from rebeca_ray.generation.pipeline import generate_catalog
from rebeca_ray.halves.sample import sample_table
from rebeca_ray.identity import UserKey, fingerprint_of, read_user_key
from rebeca_ray.prior.checkpoint import load_prior, save_prior
from tests.catalog.erasure_world import Person, traces_of
from tests.conftest import snapshot_of, write_tiny_prior
from tests.faults.world import Drawn, in_this_process
from tests.generation.test_nights import MONDAY
from tests.generation.test_plan import write_history_prior

SECRET = "a secret of sixteen bytes or more"
SOURCE = "env:REBECA_USER_KEY"
ANN, BEN, CLEO = "Ann.Zqx@example.com", "Ben Zqx", "cleo/zqx=1"
PEOPLE = [ANN, BEN, CLEO, "Dée-zqx"]


@pytest.fixture(autouse=True)
def _key_and_plain_images(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("REBECA_USER_KEY", SECRET)
    with in_this_process(Drawn()):
        yield


@pytest.fixture
def key() -> UserKey:
    key = read_user_key(SOURCE)
    assert key is not None
    return key


@pytest.fixture
def night(config: GenerateConfig, tmp_path: Path) -> GenerateConfig:
    """A night of PEOPLE by their histories; the last of them has none."""
    write_ratings(tmp_path, [(ANN, 1, 5.0), (ANN, 2, 1.0), (BEN, 3, 4.0), (CLEO, 4, 5.0)])
    pq.write_table(pa.table({"user_id": PEOPLE}), tmp_path / "request.parquet")
    return GenerateConfig.model_validate(
        {
            **config.model_dump(exclude={"interactions"}),
            "prior": write_history_prior(tmp_path, "history"),
            "interactions": {"path": str(tmp_path / "interactions.parquet")},
            "user_key": SOURCE,
            "run_date": MONDAY,
        }
    )


def write_ratings(folder: Path, rows: list[tuple[str, int, float]]) -> None:
    columns = {
        "user_id": [user for user, _, _ in rows],
        "item_id": [f"real-{item}" for _, item, _ in rows],
        "rating": pa.array([rating for *_, rating in rows], pa.float32()),
    }
    pq.write_table(pa.table(columns), folder / "interactions.parquet")


def traces(folder: str) -> list[str]:
    """Return the files below a folder that hold the id of one of PEOPLE, in bytes, tables or names."""
    return [file for user in PEOPLE for file in traces_of(Person(user, set(), set()), folder)]


@given(st.lists(st.text(st.characters(exclude_categories=("Cs",)), min_size=1), unique=True))
def test_pseudonyms_are_hexadecimal_distinct_and_the_same_in_any_order(user_ids: list[str]) -> None:
    key = UserKey("env:REBECA_USER_KEY", fingerprint_of(secret_of(SECRET)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REBECA_USER_KEY", SECRET)
        pseudonyms = key.pseudonyms(user_ids)
        assert key.pseudonyms(reversed(user_ids)) == pseudonyms[::-1]
    assert len({*pseudonyms, key.fingerprint}) == len(user_ids) + 1
    assert all(len(text) == 32 and set(text) <= set("0123456789abcdef") for text in pseudonyms)


def secret_of(text: str) -> bytes:
    return hashlib.blake2b(b"pseudonyms\x1f" + text.encode()).digest()


def test_a_pseudonym_is_the_documented_hash_and_another_key_gives_another(
    key: UserKey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = hashlib.blake2b(ANN.encode(), key=secret_of(SECRET), digest_size=16).hexdigest()
    assert key.pseudonym(ANN) == expected
    assert key.pseudonym("") == ""  # names nobody
    (tmp_path / "key").write_text(f"{SECRET}\n")
    from_file = read_user_key(str(tmp_path / "key"))
    assert from_file is not None
    assert (from_file.fingerprint, from_file.pseudonym(ANN)) == (key.fingerprint, expected)
    (tmp_path / "key").write_text(f"{SECRET}.")
    with pytest.raises(InputError, match="is another key here than where the job began"):
        from_file.pseudonym(ANN)
    monkeypatch.setenv("REBECA_USER_KEY", "short")
    with pytest.raises(InputError, match=r"has 5 bytes, expected a secret key of at least 16; give one"):
        key.pseudonym(ANN)
    assert read_user_key(None) is None
    raw = bytes(range(128, 160))  # no text
    (tmp_path / "key").write_bytes(raw)
    monkeypatch.setitem(os.environb, b"REBECA_USER_KEY", raw)
    from_bytes, same = read_user_key("env:REBECA_USER_KEY"), read_user_key(str(tmp_path / "key"))
    assert from_bytes is not None
    assert same is not None
    assert from_bytes.fingerprint == same.fingerprint


def test_two_nights_hold_pseudonyms_alone_and_carry_all_items(
    night: GenerateConfig, key: UserKey, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    with caplog.at_level(logging.DEBUG):
        first = snapshot_of(night)
        second = snapshot_of(night.model_copy(update={"run_date": MONDAY.replace(day=3)}))
        snapshot = read_catalog(night.catalog)
        export_images(snapshot, f"{tmp_path}/out/images", "https://cdn.example.com")
        export_key_values(snapshot, f"{tmp_path}/out/values", "jsonl")
    assert first.counts.new == 9
    assert (second.counts.new, second.counts.carried, second.counts.population) == (0, 9, 3)
    assert second.user_key_fingerprint == key.fingerprint
    assert sorted(snapshot.table("users")["user_id"].to_pylist()) == sorted(["", *key.pseudonyms(PEOPLE)])
    assert snapshot.for_user(key.pseudonym(ANN)).num_rows == 3
    assert [traces(night.catalog), traces(f"{tmp_path}/out")] == [[], []]
    assert traces_of(Person(key.pseudonym(ANN), set(), set()), f"{tmp_path}/out") != []
    assert "zqx" not in caplog.text.lower()
    # The scan sees what it looks for: the inputs hold everybody.
    assert len(traces(str(tmp_path))) >= 4


def test_another_key_or_none_is_refused(
    night: GenerateConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    snapshot_of(night)
    raw = GenerateConfig.model_validate(
        {**night.model_dump(), "user_key": None, "interactions": {"path": night.interactions.path}}  # type: ignore[union-attr]
    )
    with pytest.raises(InputError, match="holds pseudonyms, but user_key is not set; set it to their key"):
        snapshot_of(raw)
    with monkeypatch.context() as another:
        another.setenv("REBECA_USER_KEY", "another secret of sixteen bytes")
        with pytest.raises(InputError, match=f"pseudonyms of another key than user_key {SOURCE}; set their"):
            snapshot_of(night)
    plain = raw.model_copy(update={"catalog": f"{tmp_path}/plain"})
    snapshot_of(plain)
    with pytest.raises(InputError, match=f"holds user ids as they are, but user_key {SOURCE} is set"):
        snapshot_of(night.model_copy(update={"catalog": plain.catalog}))
    assert len(list(Path(night.catalog, "snapshots").glob("*/*"))) == 1
    monkeypatch.delenv("REBECA_USER_KEY")
    with pytest.raises(InputError, match=f"user_key {SOURCE}: the variable is not set here"):
        snapshot_of(night)


def test_a_prior_with_a_table_of_users_remembers_the_key(
    night: GenerateConfig, key: UserKey, tmp_path: Path
) -> None:
    assert night.interactions is not None
    items = np.array([f"real-{number}" for number in range(20)], object)
    histories = build_histories(night.interactions, items, str(tmp_path / "storage"))
    users = user_table(histories)
    assert sorted(users["user_id"].to_pylist()) == sorted(key.pseudonyms([ANN, BEN, CLEO]))
    assert traces(str(tmp_path / "storage")) == []
    uri = write_tiny_prior(tmp_path, users=users)
    by_id = night.model_copy(update={"prior": uri, "interactions": None, "catalog": f"{tmp_path}/other"})
    with pytest.raises(InputError, match=f"prior {uri}: holds user ids as they are, but user_key"):
        snapshot_of(by_id)
    save_prior(replace(load_prior(uri), user_key=key.fingerprint), uri)
    assert load_prior(uri).user_key == key.fingerprint
    counts = snapshot_of(by_id).counts
    assert (counts.new, counts.population) == (9, 3)


def test_forgetting_takes_the_id_and_the_command_prints_pseudonyms(
    night: GenerateConfig, key: UserKey, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(KEY, "the secret of the tombstones")
    snapshot_of(night)
    run = CliRunner().invoke
    printed = run(app, ["catalog", "pseudonyms", night.catalog], input=f"{ANN}\n{BEN}\n")
    assert printed.stdout.split() == key.pseudonyms([ANN, BEN])
    pq.write_table(pa.table({"user_id": [CLEO]}), tmp_path / "one.parquet")
    printed = run(app, ["catalog", "pseudonyms", night.catalog, "--users", str(tmp_path / "one.parquet")])
    assert printed.stdout.split() == [key.pseudonym(CLEO)]
    erased = json.loads(run(app, ["catalog", "forget", night.catalog, "--users", "-"], input=ANN).stdout)
    assert erased["removed"]["rows of items"] == 3
    assert read_catalog(night.catalog).for_user(key.pseudonym(ANN)).num_rows == 0
    assert read_catalog(night.catalog).for_user(key.pseudonym(BEN)).num_rows == 3
    assert traces_of(Person(key.pseudonym(ANN), set(), set()), night.catalog) == []
    counts = snapshot_of(night.model_copy(update={"run_date": MONDAY.replace(day=3)})).counts
    assert (counts.requested, counts.carried) == (9, 6)
    monkeypatch.delenv("REBECA_USER_KEY")
    with pytest.raises(InputError, match=r"env:REBECA_USER_KEY: the variable is not set here"):
        forget(night.catalog, [BEN], Places())


def test_forgetting_needs_the_key_also_before_anything_is_published(
    night: GenerateConfig, key: UserKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A snapshot that the gate refused holds people, and may be published later."""
    monkeypatch.setenv(KEY, "the secret of the tombstones")
    strict = GateSettings(min_items=1000, max_p_value=None)
    with pytest.raises(QualityGateError):
        generate_catalog(night.model_copy(update={"gate": strict}), in_process=True)
    erased = forget(night.catalog, [ANN], Places())
    assert erased.removed.counts["rows of items"] == 3
    monkeypatch.delenv("REBECA_USER_KEY")
    with pytest.raises(InputError, match="the variable is not set here"):
        forget(night.catalog, [BEN], Places())


def test_forgetting_before_a_first_snapshot_uses_the_key_that_is_set(
    night: GenerateConfig, key: UserKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY, "the secret of the tombstones")
    with hold_lease(night.catalog, "generate", 60):
        pass  # the first night was killed
    forget(night.catalog, [ANN], Places())
    counts = snapshot_of(night).counts
    assert (counts.requested, counts.new) == (9, 6)


def test_sampling_takes_ids_and_returns_pseudonyms(
    night: GenerateConfig, key: UserKey, tmp_path: Path
) -> None:
    names = ("prior", "items", "interactions", "sampler", "user_key")
    values = {name: value for name, value in night.model_dump().items() if name in names}
    config = SampleConfig.model_validate({**values, "storage": str(tmp_path / "s"), "num_images": 1})
    rows = sample_table(config, [ANN, "nobody"])
    assert sorted(rows["user_id"].to_pylist()) == sorted(key.pseudonyms([ANN, "nobody"]))
    pq.write_table(pa.table({"user_id": [ANN]}), tmp_path / "users.parquet")
    from_file = sample_table(config.model_copy(update={"users": str(tmp_path / "users.parquet")}))
    ann = rows.filter(pc.equal(rows["user_id"], key.pseudonym(ANN)))
    assert from_file["seed"].to_pylist() == ann["seed"].to_pylist()


def test_the_key_of_a_job_is_that_of_its_interactions() -> None:
    values = {"items": "i", "out": "o", "interactions": {"path": "p"}, "user_key": SOURCE}
    config = TrainConfig.model_validate(values)
    assert config.interactions.user_key == SOURCE
    assert TrainConfig.model_validate(config.model_dump()) == config
    with pytest.raises(ValueError, match=r"interactions\.user_key differs from user_key"):
        TrainConfig.model_validate({**values, "interactions": {"path": "p", "user_key": "env:OTHER"}})
    file = InteractionSettings(path="p")
    config = TrainConfig.model_validate({**values, "interactions": file, "user_key": "a.key"})
    assert config.interactions.user_key == config.user_key == f"{os.getcwd()}/a.key"
    with pytest.raises(ValidationError, match="names no environment variable") as refused:
        TrainConfig.model_validate({**values, "user_key": "env:"})
    assert [error["loc"] for error in refused.value.errors()] == [("user_key",)]
