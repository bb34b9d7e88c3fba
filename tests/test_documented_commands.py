"""A test runs every command of the pages: here or in `test_documented_jobs.py` as it stands, or elsewhere.

The table says where, or why no test can.
"""

import importlib
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from safetensors.torch import load_file
from typer.testing import CliRunner

from rebeca_ray.catalog.read import Snapshot, read_catalog
from rebeca_ray.cli.commands import app
from rebeca_ray.config.jobs import GenerateConfig
from tests.conftest import REPO, USERS
from tests.generation.test_nights import night
from tests.test_docs import DOCS, PAGES, PLANNED_TARGETS, block_commands, inline_commands

MAKE = "tests/test_docs.py::test_make_plans_every_target"  # the targets install 8 GB
README = "tests/test_docs.py::test_the_commands_of_the_readme_run"
NIGHT = "tests/ops/test_local_prod.py::test_three_nights_with_a_fault_each_lose_and_double_nothing"
TRITON = "tests/decoder/test_triton_client.py"
SERVE = f"{TRITON}::test_a_server_that_is_killed_and_restarted_loses_and_repeats_nothing"
SAMPLE = "tests/halves/test_sample.py::test_the_commands_of_the_page_run_without_ray"
DATA = "tests/cli/test_data_commands.py::test_every_command_of_the_documentation_runs"
WEIGHTS = "tests/stickers/test_weights.py::test_linear_probes_on_held_out_names"
SUBMITTED = "tests/test_jobs.py::test_every_job_runs_by_itself_and_knows_its_default_config"  # as a dry run
GENERATE_YAML = "rebeca generate --config generate.yaml"
REGISTRY = "needs a package registry; a test below looks for the extras in the lock file"
GPU = "needs an NVIDIA GPU; tests/gpu runs it on one"
HOURS = "trains for hours"
BENCHMARK = "measures for minutes; the last test of this file imports it"

# The test that runs a command, with other paths or fewer rows, or the reason why no test can. A key that ends
# with `*` stands for all commands that begin so.
ELSEWHERE = {
    **{f"make {target}": MAKE for target in PLANNED_TARGETS},
    "source .venv/bin/activate": README,
    "cd mine": README,
    f"{GENERATE_YAML} num_images=10 --dry-run": README,
    "rebeca embed --config embed.yaml": README,  # as a dry run
    "rebeca init *": "tests/cli/test_init.py::test_the_commands_of_the_documentation_run",
    "rebeca data *": DATA,
    "rebeca embed --config jobs/configs/embed_openclip.yaml *": DATA,
    "rebeca sample --prior prior --users users.parquet --num-images 10 --out embeddings.parquet": SAMPLE,
    "rebeca sample --prior prior --all --out everybody.parquet *": SAMPLE,
    "rebeca decode --config generate.yaml --embeds embeddings.parquet --out images.parquet": (
        "tests/halves/test_decode.py::test_the_command_writes_images_or_one_line_and_nothing"
    ),
    "rebeca serve --config generate.yaml": SERVE,
    f"{GENERATE_YAML} decoder.backend=triton decoder.num_actors=1": (
        f"{TRITON}::test_both_backends_write_the_same_catalog"
    ),
    f"{GENERATE_YAML} decoder.engine=openvino decoder.engine_dir=/models/decoder-int8 decoder.dtype=int8": (
        "tests/evaluation/test_quantization.py::test_an_int8_unet_draws_nearly_what_torch_draws"
    ),
    "rebeca catalog export atlas *": (
        "tests/catalog/test_atlas.py::test_every_item_has_an_image_a_position_and_its_nearest_others"
    ),
    "rebeca catalog forget *": (
        "tests/catalog/test_forget.py::test_a_dry_run_lists_and_changes_nothing_and_the_command_prints_json"
    ),
    "rebeca catalog groups *": (
        "tests/evaluation/test_groups.py::test_the_command_prints_a_table_or_json_also_of_pseudonyms"
    ),
    "rebeca catalog pseudonyms *": (
        "tests/test_pseudonyms.py::test_forgetting_takes_the_id_and_the_command_prints_pseudonyms"
    ),
    "rebeca catalog verify CATALOG --provenance": (
        "tests/generation/test_provenance.py"
        "::test_the_command_reports_how_many_were_checked_and_damage_ends_with_4"
    ),
    "rebeca stickers simulate *": NIGHT,
    "python infra/examples/rank_example.py --user ID": (
        "tests/test_rank_example.py::test_it_ranks_unrated_items_retrieved_and_generated_together"
    ),
    "ray get-auth-token --generate": NIGHT,
    "chmod 600 ~/.ray/auth_token": NIGHT,
    "export RAY_AUTH_MODE=token": NIGHT,
    "ray start --head --disable-usage-stats": NIGHT,
    """ray start --resources '{"decoder_slot": 1}'""": NIGHT,
    **{f"ray job submit --working-dir . jobs/{job}.py": NIGHT for job in ("generate_catalog", "nightly")},
    **{f"ray job submit --working-dir . jobs/{job}.py": SUBMITTED for job in ("embed_items", "train_prior")},
    "ray job submit --working-dir . -- jobs/generate_catalog.py *": NIGHT,
    ".venv/bin/python -m pytest tests/prior/test_sampling.py -k ddpm": (
        "tests/prior/test_sampling.py::test_every_step_equals_diffusers"
    ),
    ".venv/bin/python -m pytest -s tests/stickers/test_weights.py": WEIGHTS,
    "pytest -s tests/stickers/test_weights.py": WEIGHTS,
    "pytest tests/catalog/test_golden.py": (
        "tests/catalog/test_golden.py::test_every_version_reads_as_it_was_written"
    ),
    "pytest tests/gpu": GPU,
    "tests/gpu/measure.sh --tiny": "measures for minutes; tests/gpu/test_measure.py tests its parts",
    "python serving/build_engines.py *": GPU,
    "python -m tests.platforms.terraform": (
        "tests/platforms/test_terraform.py::test_terraform_validates_the_files_and_plans_the_record"
    ),
    "ray up infra/aws-cluster.yaml": "starts machines on AWS",
    "ray dashboard infra/aws-cluster.yaml": "needs a cluster on AWS",
    "python -m tests.test_docs": (
        "tests/test_docs.py::test_the_file_tree_matches_the_docstrings_of_the_modules"
    ),
    "python -m tests.provenance.test_signing": (
        "tests/provenance/test_signing.py::test_a_signature_costs_at_most_4_kb"
    ),
    "python -m rebeca_ray.decoder.safety_model.convert *": (
        "tests/decoder/test_safety.py::test_a_package_becomes_the_shipped_weights"
    ),
    "python -m rebeca_ray.stickers.build.items": "needs npm and its registry",
    "python -m rebeca_ray.stickers.build.clip": HOURS,
    "python -m rebeca_ray.stickers.build.vae": HOURS,
    "python -m rebeca_ray.stickers.build.unet": HOURS,
    "python -m rebeca_ray.stickers.build.unet --continue-shipped": HOURS,
    "python -m rebeca_ray.stickers.build.judge": HOURS,
    "python -m rebeca_ray.stickers.build.lcm": (
        "tests/stickers/test_lcm.py::test_the_lora_learns_is_saved_and_draws"
    ),
    "python -m tests.bench.*": BENCHMARK,
    "python -m tests.faults.real_campaign*": "runs nights for an hour",
    "python -m tests.faults.soak*": "runs nights for half an hour",
    "python tests/bench/*": BENCHMARK,
    "pip install *": REGISTRY,
    "pip wheel *": "needs a package registry; tests/platforms/test_wheel.py builds the wheel without one",
    "uvx embedding-atlas *": "needs a package registry and a browser",
}


def commands_of(page: Path) -> Iterator[str]:
    """Yield the commands of a page. A name or a bare option in prose, as in `rebeca train`, is no command."""
    yield from block_commands(page)
    for command in inline_commands(page):
        if not re.fullmatch(r"(rebeca|ray)( [a-z0-9-]+)+", command):
            yield command


COMMANDS = list(dict.fromkeys(command for page in PAGES for command in commands_of(page)))


def entries_for(command: str) -> list[str]:
    """Return the keys of the table that stand for a command."""
    return [
        key
        for key in ELSEWHERE
        if key == command or (key.endswith("*") and command.startswith(key.removesuffix("*")))
    ]


def run_here(beginning: str) -> list[str]:
    """Return the commands with this beginning that no other test runs."""
    return [command for command in COMMANDS if command.startswith(beginning) and not entries_for(command)]


BUNDLED = [command for command in run_here("rebeca ") if "--config jobs/configs/" in command]
CATALOG = run_here("rebeca catalog ")
GENERATE = run_here(GENERATE_YAML)
NIGHTLY = [*run_here("rebeca nightly "), *run_here("rebeca --log-level warning --log-json nightly ")]
ESTIMATE = run_here("rebeca estimate ")
TRAIN = run_here("rebeca train --config train.yaml")
DISTILL = run_here("rebeca distill --config distill.yaml")
GALLERY = run_here("rebeca gallery ")
EXPORT = run_here("rebeca export ")
CONVERT = run_here("rebeca convert ")
PYTHON = run_here("python -c ")
HERE = [
    *BUNDLED, *CATALOG, *GENERATE, *NIGHTLY, *ESTIMATE, *TRAIN, *DISTILL, *GALLERY, *EXPORT, *CONVERT,
    *PYTHON,
]  # fmt: skip


def test_a_test_runs_every_command_once_or_the_table_says_why_not() -> None:
    assert len(COMMANDS) > 100
    for command in COMMANDS:
        assert HERE.count(command) + len(entries_for(command)) == 1, command


def test_the_table_has_no_stale_entry_and_names_tests_that_exist() -> None:
    stale = set(ELSEWHERE) - {key for command in COMMANDS for key in entries_for(command)}
    assert not stale
    for value in ELSEWHERE.values():
        path, is_test, name = value.partition("::")
        if is_test:
            assert f"def {name}(" in (REPO / path).read_text(), value


def code_of(command: str) -> tuple[int, str]:
    """Run a command in this process; return its exit code and its output."""
    result = CliRunner().invoke(app, shlex.split(command)[1:])
    return result.exit_code, result.output


def run(command: str) -> str:
    code, output = code_of(command)
    assert code == 0, f"{command}: {output}"
    return output


@pytest.fixture
def nights(config: GenerateConfig) -> list[Snapshot]:
    """Publish two nights, for the commands that go back."""
    return [night(config, USERS[:2])[1], night(config, USERS[:3], 1)[1]]


def test_the_catalog_commands_run(
    nights: list[Snapshot], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run them in the order of the pages on one catalog. A store of a page is a folder here."""
    assert len(CATALOG) >= 10
    monkeypatch.chdir(tmp_path)
    root, (first, second) = str(nights[0].root), [str(snapshot.run_id) for snapshot in nights]
    assert root == str(tmp_path / "catalog")
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
        for written, substitute in stores.items():
            command = command.replace(written, substitute)
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


def test_the_conversions_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(CONVERT) == 2
    monkeypatch.chdir(tmp_path)
    for command in CONVERT:
        pickle, out = command.split()[2:]
        torch.save({"weight": torch.ones(2)}, pickle)
        assert run(command) == f"1 tensors -> {out}\n"
        assert load_file(out)["weight"].tolist() == [1, 1]


def test_the_request_of_all_raters_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (command,) = PYTHON
    monkeypatch.chdir(tmp_path)
    Path("flickr").mkdir()
    pq.write_table(pa.table({"user_id": ["ann", "ben", "ann"]}), "flickr/interactions.parquet")
    exec(shlex.split(command)[2], {})
    assert sorted(pq.read_table("flickr/request.parquet")["user_id"].to_pylist()) == ["ann", "ben"]


def test_the_locked_packages_include_the_extras() -> None:
    """After `make setup`, pip has nothing to install for the extras that the pages name."""
    extras = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    locked = set(re.findall(r"^([\w.-]+)==", (REPO / "requirements.lock").read_text(), re.M))
    named = {extra for command in COMMANDS for extra in re.findall(r"rebeca-ray\[(\w+)\]", command)}
    assert len(named) >= 6
    for extra in named:
        assert {canonicalize_name(Requirement(line).name) for line in extras[extra]} <= locked, extra


def test_every_benchmark_of_the_pages_can_start() -> None:
    """Import each, and look for the named parts: a measurement would take minutes."""
    benchmarks = [
        command for command in COMMANDS if re.match(r"python (-m tests\.bench\.|tests/bench/)", command)
    ]
    assert len(benchmarks) >= 10
    for command in benchmarks:
        name, *parts = command.removeprefix("python ").removeprefix("-m ").split()
        with matplotlib.rc_context():
            module = importlib.import_module(name.replace("/", ".").removesuffix(".py"))
        for part in parts:
            assert f'"{part}"' in Path(str(module.__file__)).read_text(), command
