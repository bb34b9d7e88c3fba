"""The catalog commands, the config commands and the first lines of Python of the pages run as they stand."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from rebeca_ray.catalog.read import Snapshot, read_catalog
from rebeca_ray.cli.commands import app
from rebeca_ray.config.jobs import GenerateConfig
from tests.conftest import REPO, USERS
from tests.generation.test_nights import night
from tests.test_docs import DOCS, block_commands

PAGES = ("quickstart.md", "operations.md", "reading.md", "evaluation.md", "data.md")
COMMANDS = [command for page in PAGES for command in block_commands(DOCS / page)]
CATALOG = [command for command in COMMANDS if command.startswith("rebeca catalog ")]
BUNDLED = [command for command in COMMANDS if "--config jobs/configs/" in command]


@pytest.fixture
def nights(config: GenerateConfig) -> list[Snapshot]:
    """Publish two nights, for the commands that go back."""
    return [night(config, USERS[:2])[1], night(config, USERS[:3], 1)[1]]


def run(command: str) -> str:
    result = CliRunner().invoke(app, shlex.split(command)[1:])
    assert result.exit_code == 0, f"{command}: {result.output}"
    return result.output


def test_the_catalog_commands_run(nights: list[Snapshot], tmp_path: Path) -> None:
    """Run them in the order of the pages on one catalog. A store of a page is a folder here."""
    assert len(CATALOG) >= 10
    root, (first, second) = str(nights[0].root), [str(snapshot.run_id) for snapshot in nights]
    stores = {
        "s3://bucket/catalog": root,
        "~/rebeca-stickers/catalog": root,
        "s3://cdn-origin/recs": f"{tmp_path}/images",
        "s3://bucket/kv": f"{tmp_path}/kv",
        "/data/iceberg": f"{tmp_path}/iceberg",
        "20260301T020000-1a2b3c": first,
        "--run-id ID": f"--run-id {second}",
    }
    (tmp_path / "iceberg").mkdir()
    for command in CATALOG:
        for written, here in stores.items():
            command = command.replace(written, here)
        run(command)
        if " rollback " in command:
            assert read_catalog(root).run_id == first


@pytest.mark.parametrize("command", BUNDLED)
def test_the_commands_on_bundled_configs_resolve(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPO)
    assert run(f"{command} --dry-run").startswith("{")


def test_the_python_of_the_quick_start_runs(
    nights: list[Snapshot], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (code,) = re.findall(r"^```python\n(.*?)^```$", (DOCS / "quickstart.md").read_text(), re.M | re.S)
    monkeypatch.chdir(tmp_path)
    variables: dict[str, Any] = {}
    exec(code.replace("~/rebeca-stickers/catalog", str(nights[0].root)), variables)
    assert variables["items"].num_rows == 3
    assert Path("first.webp").read_bytes() == variables["snapshot"].images(variables["items"])[0]
