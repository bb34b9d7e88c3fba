"""The command line: light to import, plain help, results for people and as JSON, one-line errors."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import typer

import rebeca_ray
from rebeca_ray.catalog.read import Snapshot
from rebeca_ray.cli.commands import app
from rebeca_ray.cli.runner import RESUMES, STARTS_OVER, print_result
from rebeca_ray.config.jobs import GenerateConfig
from tests.conftest import USERS
from tests.generation.test_nights import night

REBECA = str(Path(sys.executable).parent / "rebeca")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([REBECA, *arguments], capture_output=True, text=True, timeout=120)


def commands(group: click.Group, name: str = "rebeca") -> Iterator[tuple[str, click.Command]]:
    for command in group.commands.values():
        yield f"{name} {command.name}", command
        if isinstance(command, click.Group):
            yield from commands(command, f"{name} {command.name}")


COMMANDS = dict(commands(typer.main.get_command(app)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("statement", "heavy"),
    [
        *(
            (f"import {module}", ("torch", "ray", "diffusers", "pandas", "pyarrow", "pydantic"))
            for module in ("rebeca_ray", "rebeca_ray.cli.commands")
        ),
        # The driver of a night without training, and its workers that decide, write and assemble.
        ("import rebeca_ray.nightly", ("torch", "ray", "diffusers", "transformers", "scipy")),
        # Every worker of a training imports this module.
        ("import rebeca_ray.training.train", ("torchmetrics", "torchvision", "transformers", "scipy")),
    ],
)
def test_importing_loads_no_heavy_package(statement: str, heavy: tuple[str, ...]) -> None:
    loaded = subprocess.run(
        [
            sys.executable,
            "-c",
            f"import sys; {statement}; print([name for name in {heavy} if name in sys.modules])",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert loaded.stdout.strip() == "[]"


def test_help_lists_the_commands() -> None:
    out = run("--help")
    assert out.returncode == 0
    for command in ("demo", "embed", "train", "generate", "stickers", "catalog", "--log-level", "--log-json"):
        assert command in out.stdout


@pytest.mark.parametrize(
    ("words", "completed"),
    [
        ("rebeca ge", ["generate"]),
        ("rebeca catalog export ", ["images", "key-values", "atlas", "iceberg"]),
        ("rebeca generate --re", ["--resume", "--retry-failed"]),
        ("rebeca generate --resume ", ["auto", "require", "never"]),
    ],
)
def test_a_shell_completes_commands_options_and_values(words: str, completed: list[str]) -> None:
    protocol = {"_REBECA_COMPLETE": "complete_bash", "COMP_WORDS": words}
    environment = os.environ | protocol | {"COMP_CWORD": str(words.count(" "))}
    out = subprocess.run([REBECA], env=environment, capture_output=True, text=True, timeout=60)
    assert out.stdout.split() == completed
    assert out.stderr == ""


@pytest.mark.parametrize(
    ("command", "work", "line"),
    [
        (["train"], "training.train.train_prior", f"stopped; {RESUMES}"),
        (["embed"], "data.embedding.embed_items", f"stopped; {STARTS_OVER}"),
        (
            ["generate"],
            "generation.pipeline.generate_catalog",
            f"stopped; {RESUMES}, on the same date in UTC or with its run_date",
        ),
        (
            ["generate", "--resume", "never"],
            "generation.pipeline.generate_catalog",
            "stopped; what was done is kept: run the same command with --resume auto to go on, "
            "on the same date in UTC or with its run_date",
        ),
        (["nightly"], "nightly.run_nightly", f"stopped; {RESUMES}"),
    ],
)
def test_each_command_says_how_to_go_on_after_ctrl_c(
    command: list[str],
    work: str,
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(f"rebeca_ray.{work}", stop)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    config = Path(rebeca_ray.__file__).parent / "stickers" / "configs" / f"{command[0]}_stickers.yaml"
    with pytest.raises(SystemExit) as caught:
        app([*command, "--config", str(config)])
    assert caught.value.code == 130
    assert capsys.readouterr().err.splitlines()[-1] == line


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_each_option_is_a_sentence_of_its_own(name: str) -> None:
    assert re.match(r"[A-Z].*[.]", (COMMANDS[name].help or "").split("\n")[0])
    for parameter in COMMANDS[name].params:
        text = getattr(parameter, "help", None)
        if parameter.name != "help":
            assert text, parameter.name
            assert re.match(r"([A-Z]|jsonl:).*[.]", text), text
    if name.startswith("rebeca catalog ") and name != "rebeca catalog export":
        (catalog, *_) = [one for one in COMMANDS[name].params if isinstance(one, click.Argument)]
        assert catalog.make_metavar(click.Context(COMMANDS[name])) == "CATALOG"


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
            ["generate", "--config", "jobs/configs/generate_stickers.yaml", "decoder.decoder_guidance=3"],
            "did you mean 'decoder_guidance_scale'",
        ),
        (
            ["generate", "--config", "jobs/configs/generate_stickers.yaml", f"{'a.' * 3000}a=1"],
            "goes 3,000 sections deep; sections go three levels down",
        ),
        (["catalog", "show", "/nothing/here"], "nothing is published there"),
        (["catalog", "show", "/nothing/[red]a[/bold]"], "/nothing/[red]a[/bold]: nothing is published"),
        (["catalog", "show", "ftp://bucket/catalog"], "is not supported; give a local path or s3://"),
    ],
)
def test_an_input_error_is_one_line_without_traceback(arguments: list[str], message: str) -> None:
    out = run(*arguments)
    assert out.returncode == 2
    assert message in out.stderr
    assert out.stderr.startswith("error: ")
    assert out.stderr.count("\n") == 1
    assert "Traceback" not in out.stdout + out.stderr


def test_an_unknown_log_level_is_an_error_of_the_options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REBECA_LOG_LEVEL", "loud")
    out = run("catalog", "list", "/nothing/here")
    assert out.returncode == 2
    assert "'loud' is not one of" in out.stderr
    assert "Traceback" not in out.stderr


@pytest.mark.parametrize("command", [["stickers", "simulate"], ["demo"]])
def test_an_unwritable_output_is_refused_at_once(tmp_path: Path, command: list[str]) -> None:
    (tmp_path / "file").write_text("in the way")
    out = run(*command, "--out", str(tmp_path / "file" / "out"))
    assert out.returncode == 2
    assert out.stderr.startswith(f"error: --out {tmp_path}/file/out: cannot be written (Not a directory)")
    assert out.stderr.count("\n") == 1


def test_dry_run_prints_the_resolved_config_and_starts_nothing() -> None:
    out = run("generate", "--config", "jobs/configs/generate_stickers.yaml", "--dry-run", "num_images=9")
    assert out.returncode == 0
    config = json.loads(out.stdout)
    assert config["num_images"] == 9
    assert config["prior"].endswith("rebeca-stickers/prior")


@pytest.mark.parametrize("command", ["list", "show", "verify", "rollback", "gc", "publish"])
def test_a_missing_catalog_is_one_line_and_is_not_created(tmp_path: Path, command: str) -> None:
    run_id = ["--run-id", "a"] if command == "publish" else []
    out = run("catalog", command, str(tmp_path / "nowhere"), *run_id)
    assert out.returncode == 2
    assert out.stderr.startswith(f"error: catalog {tmp_path}/nowhere: ")
    assert out.stderr.count("\n") == 1
    assert not (tmp_path / "nowhere").exists()


@pytest.fixture
def published(config: GenerateConfig) -> Snapshot:
    _, snapshot = night(config, USERS[:2])
    return snapshot


def test_catalog_commands_print_json_alone_on_standard_output(published: Snapshot) -> None:
    root = str(published.root)
    listed = json.loads(run("catalog", "list", root, "--json").stdout)
    assert (listed["published"], listed["lease"]) == (published.run_id, None)
    (row,) = listed["snapshots"]
    assert row == {
        "run_date": published.manifest.run_date,
        "run_id": published.run_id,
        "created_at": published.manifest.created_at,
        "items": 6,
        "new": 6,
        "users": 2,
        "bytes": published.manifest.bytes,
        "status": "published",
    }
    assert json.loads(run("catalog", "show", root, "--json").stdout) == published.manifest.model_dump(
        mode="json"
    )
    by_id = run("catalog", "show", root, "--json", "--run-id", str(published.run_id))
    assert json.loads(by_id.stdout) == published.manifest.model_dump(mode="json")
    verified = json.loads(run("catalog", "verify", root, "--json", "--level", "full").stdout)
    assert verified == {
        "run_id": published.run_id,
        "level": "full",
        "files": published.files.num_rows,
        "ok": True,
        "damage": [],
    }


def test_damage_is_printed_also_as_json_and_is_an_error(published: Snapshot) -> None:
    root = str(published.root)
    path = published.files.to_pylist()[0]["path"]
    Path(root, path).unlink()
    for form in ([], ["--json"]):
        out = run("catalog", "verify", root, "--level", "metadata", *form)
        assert out.returncode == 4
        assert out.stderr.startswith(
            f"error: catalog {root}: run {published.run_id} is damaged (1 differences"
        )
    assert json.loads(out.stdout)["damage"] == [f"{path}: is missing"]
    assert json.loads(out.stdout)["ok"] is False


def test_a_path_is_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    print_result("exported decoder -> /data/[red]a[/bold]/postgresql://user:pw@host")
    assert capsys.readouterr().out == "exported decoder -> /data/[red]a[/bold]/postgresql://user:***@host\n"


def test_people_read_units(published: Snapshot) -> None:
    out = run("catalog", "show", str(published.root))
    assert re.search(r"│ bytes +│ [\d.]+ kB", out.stdout)
    listed = run("catalog", "list", str(published.root))
    assert re.search(rf"{published.run_id} +│ 6 +│ 6 +│ published", listed.stdout)
