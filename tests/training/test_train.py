"""Training with Ray Train: balanced users, two workers, every network, and a prior that learned."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from rebeca_ray.config.jobs import TrainConfig
from rebeca_ray.config.sections import SamplerSettings
from rebeca_ray.data.histories import build_histories
from rebeca_ray.data.items import read_image_embeds
from rebeca_ray.errors import InputError, UserError
from rebeca_ray.prior.checkpoint import load_prior
from rebeca_ray.prior.diffusion import Diffusion
from rebeca_ray.prior.sampling import sample_liked
from rebeca_ray.prior.scaler import EmbedScaler
from rebeca_ray.prior.user_blocks import USERS_PER_BLOCK, Batch, Rated, UserBlock
from rebeca_ray.prior.users import UserTable, UserVectors
from rebeca_ray.storage.parquet import read_table
from rebeca_ray.training import train
from rebeca_ray.training.loop import train_epoch
from rebeca_ray.training.state import DenoisingLoss, TrainState
from rebeca_ray.training.train import run_name, train_prior
from rebeca_ray.watchdog import Activity
from tests.conftest import D
from tests.training.in_process import loop_in_process as loop_in_process  # a fixture
from tests.training.small_world import configure, training_csv


@pytest.mark.usefixtures("ray_local")
def test_two_workers_learn_as_one_and_a_rerun_changes_nothing(
    world: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each has half the batch; the loop itself checks that their weights agree. No worker reads it again."""
    activity = Activity()
    monkeypatch.setattr(train, "Activity", lambda _: activity)
    config = configure(world, "history")
    workers = config.workers.model_copy(update={"num_workers": 2})
    config = config.model_copy(update={"workers": workers})
    metrics = train_prior(config)
    assert activity.pulse is not None
    assert activity.pulse.count() >= 2
    assert_learned(config, metrics, world["folder"])

    def fail(*_: object) -> None:
        raise AssertionError("started again")

    monkeypatch.setattr(train, "start_run", fail)
    assert train_prior(config) == metrics
    assert list(Path(config.storage).rglob("events.out.tfevents*"))


@pytest.mark.usefixtures("loop_in_process")
def test_a_prior_with_a_user_table_learns_who_likes_what(world: dict[str, str]) -> None:
    config = configure(world, "id")
    metrics = train_prior(config)
    assert_learned(config, metrics, world["folder"])
    users = load_prior(config.out).users
    assert users is not None
    assert users["user_id"].to_pylist() == ["a", "b"]


def assert_learned(config: TrainConfig, metrics: dict[str, float], folder: str) -> None:
    """Assert that samples lie near the items that their users like, and that the selector knows those."""
    prior = load_prior(config.out)
    assert prior.selector is not None
    assert metrics["selector_auc"] > 0.95
    assert 0 < metrics["selector_calibration_error"] < 0.15
    centres = torch.from_numpy(np.load(f"{folder}/centres.npy")).float()
    items = read_image_embeds(config.items)
    histories = build_histories(
        config.interactions.model_copy(update={"hold_out": 0.0}), items.item_id, folder
    )
    block = UserBlock(read_table(histories.file(0), "histories"), histories.first_user_index)
    rated = block.history(np.array([0, 1]), 24).look_up(
        prior.scaler.scale(torch.from_numpy(items.image_embeds)).numpy()
    )
    sampler = SamplerSettings(num_inference_steps=10, prior_guidance_scale=2.0).resolve(prior.sampling, 100)
    users = UserVectors(token_GUH=prior.user_tokens(np.array([0, 1]), rated))
    drawn = sample_liked(
        prior, Diffusion.build(prior.diffusion), users, np.repeat([0, 1], 20), range(40), sampler
    )
    nearest = torch.nn.functional.cosine_similarity(
        drawn[:, None], prior.scaler.scale(centres)[None], dim=-1
    ).argmax(1)
    assert (nearest == torch.arange(2).repeat_interleave(20)).float().mean() >= 0.95
    lines = training_csv(config)
    assert lines[0] == "epoch,train_loss,val_loss,learning_rate,samples_per_second"
    assert float(lines[-1].split(",")[1]) < 0.7 * float(lines[1].split(",")[1])


@pytest.mark.usefixtures("loop_in_process")
def test_a_loss_that_diverges_at_once_keeps_nothing(world: dict[str, str]) -> None:
    config = configure(world, learning_rate=1e6, gradient_clip=1e6, samples_per_user=256)
    message = (
        r"training diverged: .*epoch 1.*step \d+.* at learning rate 1e\+06; "
        r"lower optimization.learning_rate.*so nothing is kept"
    )
    with pytest.raises(UserError, match=message):
        train_prior(config)
    with pytest.raises(UserError, match="no config.json there"):
        load_prior(config.out)


@pytest.mark.usefixtures("loop_in_process")
def test_a_loss_that_diverges_later_leaves_the_best_epoch(world: dict[str, str], tmp_path: Path) -> None:
    """Two good epochs; then the second is made to be run again, from the same state but at an absurd rate."""
    config = configure(world, max_epochs=2, samples_per_user=256, gradient_clip=1e6)
    train_prior(config)
    last = max(tmp_path.rglob("state.pt"), key=lambda path: path.parent.name)
    state = torch.load(last, weights_only=True)
    state["optimizer"]["param_groups"][0]["lr"] = 1e6
    torch.save({**state, "epoch": 1}, last)
    with pytest.raises(
        UserError, match=r"training diverged: .*epoch 2.*step \d+.* at learning rate 1e\+06"
    ) as caught:
        train_prior(config)
    kept = re.search(r"The best epoch \((\d), validation loss ([\d.]+)\) is kept in (.+)$", str(caught.value))
    assert kept, str(caught.value)
    weights = torch.load(Path(kept[3]) / "state.pt", weights_only=True)["average"]
    assert all(tensor.isfinite().all() for tensor in weights.values())


def in_process(config: TrainConfig) -> tuple[TrainState, DenoisingLoss, list[Batch], np.ndarray]:
    """The parts of training without Ray: what is fitted, its loss, an epoch of batches, and the items."""
    items = read_image_embeds(config.items)
    histories = build_histories(config.interactions, items.item_id, config.storage)
    block = UserBlock(read_table(histories.file(0), "histories"), histories.first_user_index)
    state = TrainState(config, D, 2, torch.device("cpu"))
    batches = block.batches(
        samples_per_user=1024,
        with_replacement=True,
        like_share=None,
        batch_size=64,
        targets=4,
        max_history=24,
        seed=(0,),
    )
    x0_ID = EmbedScaler(embed_dim=D, norm=1.0).scale(torch.from_numpy(items.image_embeds)).numpy()
    return state, DenoisingLoss(state.prior, Diffusion.build(config.diffusion), config), list(batches), x0_ID


def test_the_first_step_whose_loss_is_not_finite_is_named(world: dict[str, str]) -> None:
    config = configure(world, "history")
    state, loss, batches, x0_ID = in_process(config)
    x0_ID[7] = np.nan
    batches = [replace(batch, history=Rated.nothing(len(batch.user_index_G), 24)) for batch in batches[:5]]
    batches = [replace(batch, item_index_B=np.full_like(batch.item_index_B, 1)) for batch in batches]
    batches[2] = replace(batches[2], item_index_B=np.full_like(batches[2].item_index_B, 7))
    train_epoch(loss, state, iter(batches), x0_ID, torch.Generator().manual_seed(0), config)
    assert state.diverged == "the loss is not finite in epoch 1, step 3, at learning rate 0.003"


@pytest.mark.parametrize("target", ["epsilon", "v_prediction"])
def test_noise_that_cannot_pass_through_the_network_is_refused(world: dict[str, str], target: str) -> None:
    narrow = {"num_tokens": 1, "width": 8, "num_heads": 1}
    config = configure(world)
    values = {**config.model_dump(), "diffusion": {"prediction_type": target}}
    values["network"] = {**values["network"], **narrow}
    with pytest.raises(InputError, match=rf"1 tokens of width 8 hold fewer than D = 16 numbers.*{target}; "):
        train_prior(TrainConfig.model_validate(values))
    assert not Path(config.out).exists()


@pytest.mark.parametrize("architecture", ["cross_attention", "paper_v1", "paper_v2"])
@pytest.mark.parametrize("user_encoder", ["history", "id", "none"])
def test_every_network_learns(world: dict[str, str], architecture: str, user_encoder: str) -> None:
    config = configure(world, user_encoder)
    changes = {"architecture": architecture, "num_tokens": 2, "width": D // 2}
    config = config.model_copy(update={"network": config.network.model_copy(update=changes)})
    state, loss, batches, x0_ID = in_process(config)
    generator = torch.Generator().manual_seed(0)
    first, _ = train_epoch(loss, state, iter(batches[:10]), x0_ID, generator, config)
    train_epoch(loss, state, iter(batches[10:-10]), x0_ID, generator, config)
    last, _ = train_epoch(loss, state, iter(batches[-10:]), x0_ID, generator, config)
    assert last < 0.7 * first


@pytest.mark.usefixtures("loop_in_process")
@pytest.mark.parametrize("preset", ["paper-v1", "paper-v2"])
def test_a_paper_preset_trains(world: dict[str, str], preset: str) -> None:
    config = configure(world).model_dump(include={"interactions", "items", "out", "storage"})
    network = {"num_layers": 1, "num_heads": 2, "num_tokens": 2, "width": D // 2}
    small = {
        "interactions": {"path": world["interactions"], "min_likes": 0},
        "network": network,
        "optimization": {"max_epochs": 2, "learning_rate": 1e-3},
    }
    train_prior(TrainConfig.model_validate({**config, **small, "preset": preset}))
    prior = load_prior(config["out"])
    assert prior.settings.architecture == preset.replace("-", "_")
    assert prior.users is not None
    assert prior.users["num_likes"].to_pylist() == [20, 20]
    before = UserTable(2, prior.settings.num_user_tokens, D // 2, seed=0).rows_VUH
    assert (prior.user_rows != before).any(dim=2).all()
    epochs = training_csv(TrainConfig.model_validate({**config, **small, "preset": preset}))
    assert len(epochs) == 1 + 2


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (
            {"architecture": "paper_v2", "num_tokens": 3},
            "num_tokens is 3: paper_v2 cuts embeddings of 16 numbers",
        ),
        ({"architecture": "paper_v1", "num_tokens": 2}, "width is 32: a token of paper_v1 is a slice of the"),
        (
            {"architecture": "paper_v1", "num_tokens": 8, "width": 2},
            "width is 2: paper_v1 encodes time in an even",
        ),
    ],
)
def test_a_paper_network_that_does_not_fit_the_embeddings_is_refused(
    world: dict[str, str], network: dict[str, object], message: str
) -> None:
    config = configure(world)
    config = config.model_copy(update={"network": config.network.model_copy(update=network)})
    with pytest.raises(InputError, match=message):
        train_prior(config)
    assert not Path(config.out).exists()


def test_draws_without_replacement_need_a_single_worker(world: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="num_workers is 2, but without replacement the users of different"):
        TrainConfig.model_validate(
            {**configure(world, with_replacement=False).model_dump(), "workers": {"num_workers": 2}}
        )


@pytest.mark.usefixtures("ray_local")
def test_users_that_are_streamed_reach_one_of_two_workers_each(world: dict[str, str]) -> None:
    """More users than a worker reads at once: every one of them is trained on, and both workers know it."""
    count = USERS_PER_BLOCK + 4
    user_id = np.repeat([f"user-{number:04d}" for number in range(count)], 2)
    rating = np.tile([5, 1], count).astype(np.float32)
    pq.write_table(
        pa.table({"user_id": user_id, "item_id": ["i00", "i20"] * count, "rating": rating}),
        world["interactions"],
    )
    # Two epochs, since the last layer starts at zero, from which the first step's users learn nothing.
    config = configure(world, samples_per_user=1, batch_size=512, max_epochs=2, user_dropout=0.0)
    workers = config.workers.model_copy(update={"num_workers": 2})
    everybody = config.interactions.model_copy(update={"hold_out": 0.0, "min_likes": 0})
    train_prior(config.model_copy(update={"workers": workers, "interactions": everybody}))
    rows = load_prior(config.out).user_rows
    assert rows is not None
    before = UserTable(count, 1, 32, seed=config.optimization.seed).rows_VUH
    assert rows.shape == before.shape
    assert (rows != before).any(dim=2).all()


def test_a_folder_that_holds_something_else_is_not_overwritten(world: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "config.json").write_text('{"theirs": 1}')
    with pytest.raises(
        UserError, match=r"out .*project: holds something else \(no prior.json or config.json of ours\)"
    ):
        train_prior(configure(world).model_copy(update={"out": str(tmp_path / "project")}))
    assert [path.name for path in (tmp_path / "project").iterdir()] == ["config.json"]


def test_new_embeddings_or_users_start_a_new_run(world: dict[str, str]) -> None:
    config = configure(world)
    items = read_image_embeds(config.items)
    histories = build_histories(config.interactions, items.item_id, config.storage)
    name = run_name(config, histories, items)
    assert name.startswith("prior-")
    assert run_name(config.model_copy(update={"out": "/elsewhere"}), histories, items) == name
    assert run_name(config, histories, replace(items, image_embeds=items.image_embeds * 2)) != name
    table = pq.read_table(world["interactions"])
    renamed = table.set_column(0, "user_id", pa.array(["a"] * 40 + ["c"] * 40))
    pq.write_table(renamed, world["interactions"])
    assert (
        run_name(config, build_histories(config.interactions, items.item_id, config.storage), items) != name
    )


def test_items_without_embeddings_are_refused(world: dict[str, str]) -> None:
    pq.write_table(pa.table({"item_id": ["i00"], "image": [b""]}), world["items"])
    with pytest.raises(UserError, match="column 'image_embeds' is missing; run `rebeca embed` on them first"):
        train_prior(configure(world))
