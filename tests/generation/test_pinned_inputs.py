"""A run keeps the prior and the items that it began with, and its date."""

import datetime
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from rebeca_ray.catalog.versions import replace_version
from rebeca_ray.config.jobs import GenerateConfig
from rebeca_ray.generation import pipeline
from rebeca_ray.generation.decide import decide_all
from rebeca_ray.generation.decisions import Decisions
from rebeca_ray.prior.checkpoint import load_prior, publish_prior
from rebeca_ray.storage.objects import write_json
from tests.conftest import snapshot_of


def publish_trained(config: GenerateConfig, out: str, value: float) -> str:
    """Publish a prior with other weights, as a training would; return its fingerprint."""
    prior = load_prior(config.prior)
    prior.network.null_user_UH.data.fill_(value)
    with replace_version(out, "prior", "train") as version:
        publish_prior(prior, version, None)
    return load_prior(out).fingerprint


def publish_items(config: GenerateConfig, out: str, count: int) -> None:
    """Publish the first items of the config, as an embedding would."""
    with replace_version(out, "items", "embed") as version:
        folder = Path(version.begin("clip"))
        folder.mkdir(parents=True)
        pq.write_table(pq.read_table(str(config.items)).slice(0, count), folder / "0.parquet")
        files = [f"_versions/{folder.name}/0.parquet"]
        write_json({"clip": None, "rows": count, "files": files}, f"{folder}/embedding.json")
        version.publish(datetime.date(2026, 3, 1))


def test_a_run_keeps_its_prior_its_items_and_its_date(
    config: GenerateConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An embedding and a training end while the run decides. Its clock passes midnight with every reading."""
    prior, items = str(tmp_path / "trained"), str(tmp_path / "embedded")
    expected = publish_trained(config, prior, 1.0)
    publish_items(config, items, 20)

    def decide_late(*arguments: Any) -> Decisions:
        assert publish_trained(config, prior, 2.0) != expected
        publish_items(config, items, 1)
        return decide_all(*arguments)

    dates = iter(datetime.date(2026, 3, day) for day in range(5, 20))
    monkeypatch.setattr(GenerateConfig, "date", lambda *_: next(dates))
    monkeypatch.setattr(pipeline, "decide_all", decide_late)
    manifest = snapshot_of(config.model_copy(update={"prior": prior, "items": items}))
    assert manifest.versions["prior"] == expected
    assert manifest.run_date == "2026-03-05"
    snapshot = pipeline.published(config.catalog)
    assert snapshot is not None
    nearest = snapshot.items(["nearest_item_id"])["nearest_item_id"].to_pylist()
    assert len(set(nearest)) > 1


def test_an_unfinished_run_is_resumed_after_the_same_prior_is_published_again(
    config: GenerateConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config.model_copy(update={"prior": str(tmp_path / "trained"), "run_id": "first"})
    original = config.model_copy(update={"prior": str(tmp_path / "prior")})
    publish_trained(original, config.prior, 1.0)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "decide_all", stop)
        with pytest.raises(KeyboardInterrupt):
            snapshot_of(config)
    publish_trained(original, config.prior, 1.0)
    assert snapshot_of(config.model_copy(update={"run_id": None})).run_id == "first"
