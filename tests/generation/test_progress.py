"""The watchdog ends a run that stalls in any step, from the lease on."""

import re
import subprocess
import sys

import pytest

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
    [("check_decoder", "check"), ("check_plan", "test")],  # the first step and the last before rendering
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


@pytest.mark.usefixtures("ray_local")
def test_a_check_of_the_renderer_that_does_not_end_says_why_and_is_given_up(
    config: GenerateConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(checks, "SECONDS_BETWEEN_LINES", 1.0)
    caplog.set_level("INFO")
    decoder = config.decoder.model_copy(update={"backend": "triton", "cpus_per_actor": 999})
    with pytest.raises(ResumableError, match="decoder: its check on a node did not end within 5.4 s"):
        checks.check_renderer(decoder, 0.1)
    lines = [record.getMessage() for record in caplog.records if record.name == checks.log.name]
    assert re.sub(r"\d+ s so far", "N s so far", lines[-1]) == (
        "decoder: waiting for a node with free resources: 1 x (999 CPU, 1 decoder_slot) (N s so far)"
    )
    assert 3 <= len(lines) <= 6
