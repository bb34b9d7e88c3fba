"""`rebeca tune`: a grid of small trainings on Ray Tune, its table and plot, and what it refuses."""

from pathlib import Path
from typing import Any

import pytest

from rebeca_ray.config.tuning import TuneConfig
from rebeca_ray.errors import InputError, QualityGateError
from rebeca_ray.storage.parquet import read_table
from rebeca_ray.studies import tuning
from rebeca_ray.studies.tuning import check_grid, tune_training
from tests.conftest import D
from tests.training.small_world import configure


def grid(world: dict[str, str], **values: Any) -> TuneConfig:
    train = configure(world, "history", samples_per_user=256, max_epochs=3)
    return TuneConfig.model_validate(
        {"train": train.model_dump(), "out": f"{world['folder']}/tuning", **values}
    )


@pytest.mark.usefixtures("ray_local")
def test_every_point_is_trained_once_and_the_best_comes_first(
    world: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a learning rate of 1e-6 nothing is learned: ASHA stops that trial. A second start trains nothing."""
    config = grid(world, learning_rate=[3e-3, 1e-6], grace_epochs=1, reduction=2)
    trials = tune_training(config).to_pylist()
    assert [trial["learning_rate"] for trial in trials] == [3e-3, 1e-6]
    assert trials[0]["val_loss"] < 0.9 * trials[1]["val_loss"]
    assert [trial["epochs"] for trial in trials] == [3, 1]
    assert read_table(f"{config.out}/trials.parquet", "trials").to_pylist() == trials
    assert Path(config.out, "trials.png").read_bytes().startswith(b"\x89PNG")

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(tuning, "run_training", fail)
    assert tune_training(config).to_pylist() == trials


@pytest.mark.usefixtures("ray_local")
def test_trials_that_all_fail_end_with_an_error(
    world: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(tuning, "run_training", fail)
    with pytest.raises(QualityGateError, match="all 1 trials failed"):
        tune_training(grid(world, num_layers=[1]))


def test_the_grid_changes_its_settings_alone(world: dict[str, str]) -> None:
    config = grid(world, num_layers=[1, 2], samples_per_user=[8])
    assert config.points() == {"num_layers": (1, 2), "samples_per_user": (8,)}
    train = config.at({"num_layers": 1, "samples_per_user": 8})
    assert (train.network.num_layers, train.optimization.samples_per_user) == (1, 8)
    network = train.network.model_copy(update={"num_layers": config.train.network.num_layers})
    optimization = train.optimization.model_copy(update={"samples_per_user": 256})
    assert train.model_copy(update={"network": network, "optimization": optimization}) == config.train


def test_an_empty_grid_and_an_impossible_point_are_named(world: dict[str, str]) -> None:
    with pytest.raises(InputError, match="the grid is empty"):
        check_grid(grid(world), D)
    with pytest.raises(InputError, match=r"tune: num_heads 3: .*; change the grid"):
        check_grid(grid(world, num_heads=[2, 3]), D)
