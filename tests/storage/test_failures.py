"""Errors through Ray: the loss of a part of the cluster can be resumed, and a bug keeps its traceback."""

import pytest
import ray.exceptions as lost
from ray.core.generated.common_pb2 import ActorDiedErrorContext

from rebeca_ray.errors import InputError, ResumableError
from rebeca_ray.storage.failures import LOST_PARTS, user_error

DEAD = ActorDiedErrorContext(error_message="its node died", actor_id=bytes(16), class_name="RenderImages")


def test_every_kind_of_loss_is_one_of_ray() -> None:
    assert all(issubclass(getattr(lost, name), lost.RayError) for name in LOST_PARTS)


@pytest.mark.parametrize(
    "error",
    [
        lost.ActorDiedError(DEAD),
        lost.NodeDiedError("gone"),
        lost.OwnerDiedError("0" * 56, None, "here"),
        lost.WorkerCrashedError(),
    ],
)
def test_the_loss_of_a_part_of_the_cluster_ends_with_one_line_and_can_be_resumed(error: Exception) -> None:
    reason = user_error(error)
    assert type(reason) is ResumableError
    assert reason.exit_code == 75
    assert str(reason).startswith(f"Ray: lost a part of the cluster ({type(error).__name__}: ")
    assert str(reason).endswith("); look at its nodes and their memory, start again")
    assert "\n" not in str(reason)


def task_error(cause: Exception) -> lost.RayTaskError:
    return lost.RayTaskError("RenderImages.__init__", "Traceback …", cause, actor_id="0" * 32)


def test_a_bug_in_an_actor_is_no_loss_and_its_user_error_comes_first() -> None:
    assert user_error(task_error(KeyError("a"))) is None
    assert user_error(lost.ActorDiedError(task_error(KeyError("a")))) is None
    mistake = InputError("a")
    assert user_error(task_error(mistake)) is mistake
