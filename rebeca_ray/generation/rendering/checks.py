"""Check the decoder, and choose its device and number format, on a machine that draws."""

import logging
import time
from collections.abc import Callable
from typing import Any, TypeVar, cast

from rebeca_ray.config.decoder import DecoderSettings
from rebeca_ray.config.jobs import GenerateConfig
from rebeca_ray.decoder.build import check_decoder, needs_check
from rebeca_ray.decoder.choices import choose, is_open
from rebeca_ray.demand import unmet_demand
from rebeca_ray.errors import ResumableError
from rebeca_ray.progress import SECONDS_BETWEEN_LINES
from rebeca_ray.ray_runtime import start_ray

log = logging.getLogger(__name__)
T = TypeVar("T")
CHECK_SHARE = 0.9  # of the watchdog's time, for one check


def with_choices(config: GenerateConfig, in_process: bool) -> GenerateConfig:
    """Return the config without `auto` in its decoder, chosen on the machines that draw."""
    if not is_open(config.decoder):
        return config
    if in_process:
        decoder = choose(config.decoder)
    else:
        start_ray()
        decoder = choose_for_renderer(config.decoder, config.limits.stall_minutes)
    log.info(f"decoder: device {decoder.device}, dtype {decoder.dtype}, chosen on a machine that draws")
    return config.model_copy(update={"decoder": decoder})


def check_renderer(decoder: DecoderSettings, minutes: float | None) -> None:
    """Check server, safety checker and signature where a render actor would run, before anything is planned.

    Raises ResumableError if the check does not end in nearly `minutes`, before the watchdog does.
    """
    if needs_check(decoder):
        as_renderer(check_decoder, decoder, minutes)


def choose_for_renderer(decoder: DecoderSettings, minutes: float | None) -> DecoderSettings:
    """Return the settings without `auto`, chosen once for a run on a machine that draws.

    Raises ResumableError as `check_renderer` does.
    """
    import ray

    if decoder.device == "auto":
        gpus = ray.cluster_resources().get("GPU", 0) if decoder.engine != "openvino" else 0
        decoder = decoder.model_copy(update={"device": "cuda" if gpus else "cpu"})
    return as_renderer(choose, decoder, minutes)


def as_renderer(work: Callable[[DecoderSettings], T], decoder: DecoderSettings, minutes: float | None) -> T:
    """Return `work` of the settings, done where a render actor would run."""
    import ray

    served = decoder.backend == "triton"
    options: dict[str, Any] = {
        "num_cpus": decoder.cpus_per_actor,
        "num_gpus": 0 if served or decoder.device == "cpu" else 1,  # a checker may be on the GPU
        "resources": {"decoder_slot": 1.0} if served else {},
    }
    task: Any = ray.remote(max_retries=0)(work).options(**options)
    result = task.remote(decoder)
    deadline = None if minutes is None else 60 * CHECK_SHARE * minutes
    if not ended(result, deadline):
        ray.cancel(result, force=True)
        raise ResumableError(
            f"decoder: its check on a node did not end within {deadline:g} s "
            "(limits.stall_minutes); look for a node with its resources, and at its server; start again"
        )
    try:
        return cast(T, ray.get(result))
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None


def ended(result: Any, seconds: float | None) -> bool:
    """Return whether a check of the decoder ends within `seconds`. Meanwhile, log the reason for the wait."""
    import ray

    began = time.monotonic()
    remaining = seconds
    while remaining is None or remaining > 0:
        patience = SECONDS_BETWEEN_LINES if remaining is None else min(SECONDS_BETWEEN_LINES, remaining)
        if ray.wait([result], timeout=patience)[0]:
            return True
        waited = time.monotonic() - began
        remaining = None if seconds is None else seconds - waited
        demand = unmet_demand()
        reason = f"for a node with free resources: {demand}" if demand else "for the check on a node to end"
        log.info(f"decoder: waiting {reason} ({waited:.0f} s so far)")
    return False
