"""Each error a person can fix ends its command with one line and its own exit code."""

import subprocess
import sys
from pathlib import Path

import pytest
from ray.exceptions import RayTaskError
from ray.train import WorkerGroupError

from rebeca_ray import errors
from rebeca_ray.cli.runner import plain_errors
from rebeca_ray.errors import UserError

EXIT_CODES = {
    errors.InputError: 2,
    errors.StorageError: 2,
    errors.ErrorBudgetExceededError: 3,
    errors.QualityGateError: 4,
    errors.LeaseHeldError: 5,
    errors.ResumableError: 75,
    errors.DamagedFilesError: 75,
    errors.ServerLostError: 75,
}


def subclasses(error: type[UserError]) -> set[type[UserError]]:
    direct = set(error.__subclasses__())
    return direct.union(*(subclasses(one) for one in direct))


def test_every_error_stands_in_the_table_and_none_elsewhere() -> None:
    assert {one for one in subclasses(UserError) if one.__module__.startswith("rebeca_ray")} == set(
        EXIT_CODES
    )
    assert all(one.__module__ == "rebeca_ray.errors" for one in EXIT_CODES)
    assert not hasattr(UserError, "exit_code")  # the base is never raised


@pytest.mark.parametrize(("error", "code"), EXIT_CODES.items())
def test_exit_codes_also_through_rays_wrappers(
    error: type[UserError], code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    wrapped = WorkerGroupError("a worker failed", {0: RayTaskError("stage", "a traceback", error("a"))})
    for raised in (error("a"), wrapped):
        with pytest.raises(SystemExit) as caught, plain_errors():
            raise raised
        assert caught.value.code == code
        assert capsys.readouterr().err == "error: a\n"


def test_a_bug_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError), plain_errors():
        _ = 1 / 0


@pytest.mark.usefixtures("ray_local")
def test_an_error_in_an_actors_constructor_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    import ray

    class Stage:
        def __init__(self) -> None:
            raise errors.InputError("no such model")

        def __call__(self, batch: object) -> object:
            return batch

    pool = ray.data.ActorPoolStrategy(size=1)
    with pytest.raises(SystemExit) as caught, plain_errors():
        ray.data.range(2).map_batches(Stage, compute=pool, num_cpus=0.5).materialize()
    assert caught.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == "error: no such model"


SCRIPT = """
import logging
from typing import Annotated
import typer
from rebeca_ray.cli.runner import plain_errors, run_script
from rebeca_ray.errors import {error}

def main(config: Annotated[str, typer.Option()], name: str = "", fail: bool = False) -> None:
    "Greet."
    with plain_errors():
        logging.getLogger("rebeca_ray.x").debug("config %s", config)
        if fail:
            raise {error}("refused")
        print("hello", name)

if __name__ == "__main__":
    run_script(main, config="default.yaml")
"""


def test_a_script_has_the_log_options_of_rebeca(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(error="LeaseHeldError"))

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True)

    out = run("--name", "you", "--log-level", "DEBUG")
    assert out.stdout == "hello you\n"
    assert out.stderr.endswith(" DEBUG: config default.yaml\n")
    assert run("--config", "other.yaml", "--log-level=debug").stderr.endswith("config other.yaml\n")
    failed = run("--fail")
    assert (failed.returncode, failed.stderr) == (5, "error: refused\n")
    text = run("--help").stdout
    assert all(part in text for part in ("Usage: script.py", "Greet.", "--log-level", "--log-json", "--name"))
    assert run("--log-level", "loud").returncode == 2
