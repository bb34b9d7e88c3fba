"""Prior directories: reading returns the written prior, and names any altered file."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from rebeca_ray.errors import UserError
from rebeca_ray.prior.checkpoint import load_prior, save_prior
from rebeca_ray.prior.scaler import EmbedScaler
from tests.conftest import USERS, D


def edit(prior: str, **changes: object) -> None:
    path = Path(prior) / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_round_trip(tiny_prior: str) -> None:
    loaded = load_prior(tiny_prior)
    assert loaded.users["user_id"].to_pylist() == USERS
    assert (loaded.scaler.embed_dim, loaded.scaler.norm) == (D, 3.0)
    assert not loaded.network.training
    again = load_prior(tiny_prior)
    out, same = (
        prior.network(
            torch.ones(1, D),
            torch.tensor([5]),
            prior.network.condition(prior.user_tokens(np.array([2]), None), torch.tensor([1])),
        )
        for prior in (loaded, again)
    )
    assert (out == same).all()
    assert out.abs().max() > 0
    assert (loaded.user_tokens(np.array([2, -1]), None)[1] == loaded.network.null_user_UH).all()
    assert sorted(path.name for path in Path(tiny_prior).iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
        "training.csv",
        "users.parquet",
    ]


def test_the_same_prior_has_the_same_fingerprint_each_time_it_is_saved(
    tiny_prior: str, tmp_path: Path
) -> None:
    """The safetensors library writes metadata in random order: eight saves would agree once per 128 tries."""
    prior = load_prior(tiny_prior)
    for number in range(8):
        save_prior(prior, str(tmp_path / f"copy-{number}"))
    assert {load_prior(str(tmp_path / f"copy-{number}")).fingerprint for number in range(8)} == {
        prior.fingerprint
    }


def test_missing_directory(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no config.json there; train one with `rebeca train`"):
        load_prior(str(tmp_path / "nothing"))


def test_altered_weights(tiny_prior: str) -> None:
    path = Path(tiny_prior) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(UserError, match="sha256 differs"):
        load_prior(tiny_prior)


def test_missing_and_damaged_files(tiny_prior: str) -> None:
    (Path(tiny_prior) / "users.parquet").write_bytes(b"nothing")
    with pytest.raises(
        UserError, match=r"users.parquet is not the file config.json describes \(sha256 differs\)"
    ):
        load_prior(tiny_prior)
    (Path(tiny_prior) / "model.safetensors").unlink()
    with pytest.raises(
        UserError,
        match=r"model.safetensors cannot be read \(No such file or directory\); copy the whole directory",
    ):
        load_prior(tiny_prior)


def test_users_of_another_night_are_refused(tiny_prior: str) -> None:
    """As many users in another order would give each the taste of another."""
    path = Path(tiny_prior) / "users.parquet"
    users = pq.read_table(path)
    pq.write_table(users.set_column(0, "user_id", users["user_id"].take([1, 0, 2, 3, 4, 5, 6])), path)
    with pytest.raises(UserError, match=r"users.parquet is not the file config.json describes"):
        load_prior(tiny_prior)


def test_another_format_and_another_network(tiny_prior: str) -> None:
    edit(
        tiny_prior,
        network={"num_layers": 3, "num_heads": 2, "width": 16, "num_tokens": 3, "user_encoder": "id"},
    )
    with pytest.raises(UserError, match="weights do not fit config.json"):
        load_prior(tiny_prior)
    edit(tiny_prior, format=99)
    with pytest.raises(UserError, match="format 99, this version reads 6"):
        load_prior(tiny_prior)


def test_a_half_written_prior_is_named(tiny_prior: str) -> None:
    (Path(tiny_prior) / "config.json").write_text('{"format": "unfinished"}')
    with pytest.raises(UserError, match="was not written completely; train it again"):
        load_prior(tiny_prior)


def test_fingerprint_follows_the_content_not_the_place(tiny_prior: str, tmp_path: Path) -> None:
    Path(tiny_prior).rename(tmp_path / "moved")
    before = load_prior(str(tmp_path / "moved")).fingerprint
    edit(str(tmp_path / "moved"), sampling={"prior_guidance_scale": 3.0, "distilled_steps": None})
    assert load_prior(str(tmp_path / "moved")).fingerprint != before


@pytest.mark.parametrize(
    "changes", [{"scaler": EmbedScaler(embed_dim=D, norm=4.0).to_dict()}, {"clip": "another"}]
)
def test_weights_trained_with_another_scaler_or_clip_are_refused(
    tiny_prior: str, changes: dict[str, object]
) -> None:
    edit(tiny_prior, **changes)
    with pytest.raises(
        UserError, match=rf"config.json has {next(iter(changes))} .* its weights were trained with"
    ):
        load_prior(tiny_prior)


def test_a_config_with_any_value_missing_or_of_another_type_is_refused(tiny_prior: str) -> None:
    path = Path(tiny_prior) / "config.json"
    right = json.loads(path.read_text())
    read = ("network", "diffusion", "sampling", "condition_dropout", "scaler", "clip", "metrics", "sha256")
    spoilt = [{key: value for key, value in right.items() if key != name} for name in read]
    spoilt += [
        {**right, name: bad}
        for name in read
        for bad in (True, [1], 10**30, float("nan"), *([None, "a"] if name != "clip" else []))
    ]
    for section in ("network", "diffusion", "sampling", "scaler"):
        for name, value in right[section].items():
            may_be_null = value is None or name in ("clamp", "clip")
            bads = [[1], 10**30, float("nan"), "no such word", *([] if may_be_null else [None])]
            bads += [] if isinstance(value, bool) else [True]
            spoilt += [{**right, section: {**right[section], name: bad}} for bad in bads]
    spoilt += [{**right, "sha256": {}}, {**right, "scaler": {"embed_dim": D}}]
    for config in spoilt:
        path.write_text(json.dumps(config))
        with pytest.raises(UserError) as caught:
            load_prior(tiny_prior)
        assert str(caught.value).startswith(f"prior {tiny_prior}: ")
        assert "again" in str(caught.value)
    for text in ("[1]", "null", "7", "", "{", "[" * 100_000):
        path.write_text(text)
        with pytest.raises(UserError, match=r"config.json: (not valid JSON|holds a JSON)"):
            load_prior(tiny_prior)
