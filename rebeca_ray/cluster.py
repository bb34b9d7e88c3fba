"""Ray, joined or started, with a log of what its reader needs."""

import io
import logging
import os
import sys

RAY_ENVIRONMENT = {
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # else every line a worker prints shows twice
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # a worker's report waits for the next check, by default 2 s an epoch
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
}


def start_ray() -> None:
    """Join the cluster of `RAY_ADDRESS`, of the job that runs us, or one on this machine; else start Ray here.

    Each job calls it once its input is checked: a mistake is told at once, not after Ray's start. Does nothing to a Ray
    that runs already but make its errors and its log ours.
    """
    for name, value in RAY_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import ray
    from ray.util.debug import disable_log_once_globally

    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)  # a warning that only a Ray open to others needs
    if not ray.is_initialized():
        ray.init(address=os.environ.get("RAY_ADDRESS"), log_to_driver=True, logging_level=logging.WARNING)
    context = ray.data.DataContext.get_current()  # this sets up Ray Data's log, so only now:
    for handler in logging.getLogger("ray.data").handlers:
        if not isinstance(handler, logging.FileHandler):
            handler.setLevel(logging.CRITICAL)  # its errors are raised too, and its log file keeps all of it
    context.print_on_execution_start = False
    context.raise_original_map_exception = True  # so that a UserError in a stage arrives as one
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # what workers print appears in a job's log as it comes, not at the end
    if not sys.stderr.isatty():
        context.enable_progress_bars = False
        disable_log_once_globally()  # a reminder that bars are off, in every log
