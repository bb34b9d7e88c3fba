"""The watchdog ends a run that stalls in any step, from the lease on."""

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from rebeca_ray.config.jobs import GenerateConfig
from rebeca_ray.config.sections import LimitSettings
from rebeca_ray.errors import ResumableError
from rebeca_ray.generation.rendering import checks

DRIVER = """
import sys, time
from rebeca_ray.generation import pipeline
from rebeca_ray.config.jobs import GenerateConfig
from rebeca_ray.log import configure

def hang(*_, **__):
    time.sleep(3600)

pipeline.{step} = hang
configure()
pipeline.generate_catalog(GenerateConfig.model_validate_json(sys.argv[1]), in_process=True)
"""


@pytest.mark.parametrize(
    ("step", "stage"),
    [("check_decoder", "check"), ("request_histories", "histories"), ("check_plan", "test")],
)
def test_a_run_that_hangs_in_any_step_ends_itself(config: GenerateConfig, step: str, stage: str) -> None:
    hasty = config.model_copy(update={"limits": LimitSettings(stall_minutes=0.1)})
    process = subprocess.run(
        [sys.executable, "-c", DRIVER.format(step=step), hasty.model_dump_json()],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 75, process.stderr
    assert f"no progress for 0.1 min in stage {stage} (stall_minutes)" in process.stderr


def test_a_check_of_the_renderer_that_does_not_end_is_given_up(
    config: GenerateConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    timeouts = []

    def get(_: Any, timeout: float | None) -> None:
        timeouts.append(timeout)
        raise ray.exceptions.GetTimeoutError

    task = SimpleNamespace(options=lambda **_: SimpleNamespace(remote=lambda *_: None))
    monkeypatch.setattr(ray, "remote", lambda **_: lambda _: task)
    monkeypatch.setattr(ray, "get", get)
    monkeypatch.setattr(ray, "cancel", lambda *_, **__: None)
    decoder = config.decoder.model_copy(update={"backend": "triton"})
    with pytest.raises(ResumableError, match="decoder: its check on a node did not end within 540 s"):
        checks.check_renderer(decoder, 10)
    assert timeouts == [540]
