"""Ray as the jobs meet it: what it cannot hold is refused, and its log says how far a stage is and nothing else."""

import logging

import pytest

from rebeca_ray.errors import UserError
from rebeca_ray.ray_runtime import progress_only, require_room


@pytest.mark.usefixtures("ray_local")
def test_what_this_machine_can_never_hold_is_refused_at_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    require_room("decoder.num_actors", workers=2, cpus=0.5, device="cpu", spare_cpus=1)
    with pytest.raises(
        UserError,
        match=r"decoder.num_actors: 2 workers need 2 GPUs in all, Ray has 0; set device to cpu, or submit",
    ):
        require_room("decoder.num_actors", workers=2, cpus=0.5, device="cuda", spare_cpus=1)
    with pytest.raises(
        UserError, match=r"workers: 999 workers need 1998 CPUs in all, Ray has \d+; ask for fewer, or submit"
    ):
        require_room("workers", workers=999, cpus=2, device="cpu")
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")  # a cluster may grow
    require_room("workers", workers=2, cpus=0.5, device="cuda")
    assert (
        "2 workers need 2 GPUs in all, Ray has 0; waiting for the cluster to grow" in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("name", "text", "shown"),
    [
        ("ray.data._internal.progress.logging_progress", "MapBatches(RenderImages): 120/400", True),
        ("ray.data._internal.progress.logging_progress", "MapBatches(RenderImages): 0/400", False),
        ("ray.data._internal.progress.logging_progress", "Total Progress: 120/400", False),
        ("ray.data._internal.progress.logging_progress", "ListFiles: 1/1", False),
        ("ray.data._internal.progress.logging_progress", "======= Running Dataset: a =======", False),
        ("ray.data.exceptions", "Full stack trace: 1/2", False),
    ],
)
def test_ray_datas_log_shows_progress_alone(name: str, text: str, shown: bool) -> None:
    assert progress_only(logging.LogRecord(name, logging.INFO, "", 0, text, (), None)) is shown
