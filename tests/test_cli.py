"""The command line: light to import, honest exit codes, one-line errors."""

import subprocess
import sys
from pathlib import Path

import pytest
from ray.exceptions import RayTaskError
from ray.train import WorkerGroupError

from rebeca_ray.cli.runner import plain_errors
from rebeca_ray.errors import ErrorBudgetExceededError, InputError, LeaseHeldError, ResumableError, UserError

REBECA = str(Path(sys.executable).parent / "rebeca")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([REBECA, *arguments], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("statement", ["import rebeca_ray", "import rebeca_ray.cli.commands"])
def test_importing_loads_neither_torch_nor_ray(statement: str) -> None:
    heavy = "[name for name in ('torch', 'ray', 'diffusers', 'pandas', 'pyarrow', 'pydantic') if name in sys.modules]"
    found = subprocess.run(
        [sys.executable, "-c", f"import sys; {statement}; print({heavy})"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.strip() == "[]"


def test_help_lists_the_commands() -> None:
    out = run("--help")
    assert out.returncode == 0
    for command in ("demo", "embed", "train", "generate", "stickers", "catalog"):
        assert command in out.stdout


def test_lazy_public_names() -> None:
    import rebeca_ray
    from rebeca_ray.catalog.read import read_catalog

    assert rebeca_ray.read_catalog is read_catalog
    assert {"read_catalog", "UserError", "__version__"} <= set(dir(rebeca_ray))
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = rebeca_ray.no_such_name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--config", "nothing.yaml"], "cannot be read"),
        (
            ["generate", "--config", "jobs/configs/generate_stickers.yaml", "decoder.guidance=3"],
            "did you mean 'decoder_guidance_scale'",
        ),
        (["catalog", "show", "/nothing/here"], "nothing is published there"),
        (["catalog", "show", "ftp://bucket/catalog"], "is not supported; give a local path or s3://"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(arguments: list[str], message: str) -> None:
    out = run(*arguments)
    assert out.returncode == 2
    assert message in out.stderr
    assert out.stderr.startswith("error: ")
    assert out.stderr.count("\n") == 1
    assert "Traceback" not in out.stdout + out.stderr


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InputError("a"), 2),
        (ErrorBudgetExceededError("a"), 3),
        (LeaseHeldError("a"), 5),
        (ResumableError("a"), 75),
    ],
)
def test_every_mistake_has_its_exit_code_also_behind_rays_wrappers(
    error: UserError, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    wrapped = WorkerGroupError("a worker failed", {0: RayTaskError("stage", "a traceback", error)})
    for raised in (error, wrapped):
        with pytest.raises(SystemExit) as caught, plain_errors():
            raise raised
        assert caught.value.code == code
        assert capsys.readouterr().err == "error: a\n"


@pytest.mark.usefixtures("ray_local")
def test_a_mistake_found_in_an_actors_constructor_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    import ray

    class Stage:
        def __init__(self) -> None:
            raise InputError("no such model")

        def __call__(self, batch: object) -> object:
            return batch

    pool = ray.data.ActorPoolStrategy(size=1)
    with pytest.raises(SystemExit) as caught, plain_errors():
        ray.data.range(2).map_batches(Stage, compute=pool, num_cpus=0.5).materialize()
    assert caught.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == "error: no such model"


@pytest.mark.parametrize("command", [["stickers", "simulate"], ["demo"]])
def test_an_output_that_cannot_be_written_is_told_at_once(tmp_path: Path, command: list[str]) -> None:
    (tmp_path / "file").write_text("in the way")
    out = run(*command, "--out", str(tmp_path / "file" / "out"))
    assert out.returncode == 2
    assert out.stderr.startswith(f"error: --out {tmp_path}/file/out: cannot be written (Not a directory)")
    assert out.stderr.count("\n") == 1


def test_dry_run_prints_the_resolved_config_and_starts_nothing() -> None:
    out = run("generate", "--config", "jobs/configs/generate_stickers.yaml", "--dry-run", "num_images=9")
    assert out.returncode == 0
    assert '"num_images": 9' in out.stdout
    assert "rebeca-stickers/prior" in out.stdout


@pytest.mark.parametrize("command", ["list", "show", "verify", "rollback", "gc", "publish"])
def test_a_catalog_that_is_not_there_is_one_line_and_stays_away(tmp_path: Path, command: str) -> None:
    out = run(
        "catalog", command, str(tmp_path / "nowhere"), *(["--run-id", "a"] if command == "publish" else [])
    )
    assert out.returncode == 2
    assert out.stderr.startswith(f"error: catalog {tmp_path}/nowhere: ")
    assert out.stderr.count("\n") == 1
    assert not (tmp_path / "nowhere").exists()
