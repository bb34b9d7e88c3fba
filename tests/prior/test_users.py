"""User encoders: histories in any order and padding, and a table updated in the batch's rows alone."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from rebeca_ray.config.sections import NetworkSettings
from rebeca_ray.prior.denoisers import Prior
from rebeca_ray.prior.users import History, UserTable

D = 8


@pytest.fixture(scope="module")
def prior() -> Prior:
    torch.manual_seed(0)
    network = NetworkSettings(
        num_layers=1, num_heads=2, width=16, num_tokens=2, num_user_tokens=2, user_encoder="history"
    )
    return Prior(network, D).eval()


def history(rows: int, present: list[int]) -> History:
    generator = torch.Generator().manual_seed(1)
    return History(
        torch.randn(1, rows, D, generator=generator),
        torch.randint(0, 2, (1, rows), generator=generator),
        torch.arange(rows)[None].float() * 3,
        torch.tensor([[row in present for row in range(rows)]]),
    )


@torch.inference_mode()
def test_order_and_absent_interactions_do_not_matter(prior: Prior) -> None:
    whole = history(6, [0, 2, 3])
    turned = History(*(column[:, [5, 3, 1, 0, 2, 4]] for column in whole))
    cut = History(*(column[:, [0, 2, 3]] for column in whole))
    expected = prior.encode(whole)
    torch.testing.assert_close(prior.encode(turned), expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(prior.encode(cut), expected, atol=1e-6, rtol=1e-5)


@torch.inference_mode()
def test_item_rating_and_recency_each_matter(prior: Prior) -> None:
    base = history(4, [0, 1, 2, 3])
    expected = prior.encode(base)
    for changed in (
        base._replace(item_BLD=base.item_BLD + torch.randn(1, 4, D)),
        base._replace(like_BL=1 - base.like_BL),
        base._replace(age_BL=base.age_BL.flip(1)),
    ):
        assert (prior.encode(changed) - expected).abs().max() > 1e-4


@torch.inference_mode()
def test_an_empty_history_is_the_null_user(prior: Prior) -> None:
    assert (prior.encode(history(4, [])) == prior.null_user_UH).all()


def test_a_tables_update_is_row_wise_adagrad_on_the_rows_of_the_batch() -> None:
    table = UserTable(5, 1, 4)
    before = table.rows_VUH.clone()
    index, gradient = torch.tensor([3, 1, 3]), torch.randn(3, 1, 4)
    table.update(index, gradient, learning_rate=0.5)
    assert (table.rows_VUH[[0, 2, 4]] == before[[0, 2, 4]]).all()
    for row, total in ((1, gradient[1]), (3, gradient[0] + gradient[2])):
        step = 0.5 * total / total.square().mean().sqrt()
        torch.testing.assert_close(table.rows_VUH[row], before[row] - step)
    table.update(torch.tensor([1]), gradient[:1], learning_rate=0.5)
    squares = gradient[1].square().mean() + gradient[0].square().mean()
    assert table.squares_V[1].item() == pytest.approx(squares.item(), rel=1e-5)
    assert table.squares_V[[0, 2, 4]].tolist() == [0, 0, 0]


def test_a_tables_update_by_adamw_moves_every_row_as_torch_would() -> None:
    table = UserTable(5, 1, 4, weight_decay=0.1)
    expected = table.rows_VUH.clone().requires_grad_()
    torch_adamw = torch.optim.AdamW([expected], lr=0.5, weight_decay=0.1)
    again = UserTable(5, 1, 4, weight_decay=0.1)
    index = torch.tensor([3, 1, 3])
    for step, learning_rate in enumerate((0.5, 0.5, 0.25)):
        gradient = torch.randn(3, 1, 4, generator=torch.Generator().manual_seed(step))
        table.update(index, gradient, learning_rate)
        torch_adamw.param_groups[0]["lr"] = learning_rate
        expected.grad = torch.zeros_like(expected).index_add_(0, index, gradient)
        torch_adamw.step()
        torch.testing.assert_close(table.rows_VUH, expected.detach())
        if step == 1:
            again.load_state_dict(copy.deepcopy(table.state_dict()))
    again.update(index, gradient, 0.25)  # the state holds the moments too
    assert torch.equal(again.rows_VUH, table.rows_VUH)


def exchange(rank: int, meeting: str, index_B: torch.Tensor, gradient_BUH: torch.Tensor, out: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    table = UserTable(5, 1, 4)
    for _ in range(2):
        table.update(index_B.chunk(2)[rank], gradient_BUH.chunk(2)[rank], learning_rate=0.5)
    torch.save(table.state_dict(), f"{out}/{rank}.pt")
    dist.destroy_process_group()


def test_two_workers_make_the_update_of_one_with_both_their_batches(tmp_path: Path) -> None:
    """The loss is a mean: the gradient of half a batch is twice that of the whole batch."""
    index, gradient = (
        torch.tensor([3, 1, 3, 0]),
        torch.randn(4, 1, 4, generator=torch.Generator().manual_seed(0)),
    )
    alone = UserTable(5, 1, 4)
    for _ in range(2):
        alone.update(index, gradient / 2, learning_rate=0.5)
    torch.multiprocessing.spawn(
        exchange, (str(tmp_path / "meeting"), index, gradient, str(tmp_path)), nprocs=2
    )
    for rank in range(2):
        both = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        torch.testing.assert_close(both["rows"], alone.rows_VUH)
        torch.testing.assert_close(both["squares"], alone.squares_V)


def test_a_new_table_depends_on_its_seed_alone() -> None:
    assert (UserTable(4, 2, 8, seed=1).rows_VUH == UserTable(4, 2, 8, seed=1).rows_VUH).all()
    assert np.isclose(UserTable(400, 2, 8, seed=2).rows_VUH.std().item(), 1.0, rtol=0.05)
