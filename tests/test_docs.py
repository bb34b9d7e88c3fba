"""The documentation stays true: length, links, rooms, file tree, commands, and rules of plain English.

`python -m tests.test_docs` writes the file tree of `infra/docs/architecture.md` from the docstrings.
"""

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from ray.scripts.scripts import cli as ray_command

from rebeca_ray import schemas
from rebeca_ray.catalog.read import read_catalog
from rebeca_ray.cli.commands import app

REPO = Path(__file__).parents[1]
PACKAGE = REPO / "rebeca_ray"
README = REPO / "README.md"
DOCS = REPO / "infra" / "docs"
ARCHITECTURE = DOCS / "architecture.md"
COPIED = DOCS / "contributing.md"  # `make docs` writes it for the site
PAGES = [README, REPO / "CONTRIBUTING.md", *sorted(set(DOCS.glob("*.md")) - {COPIED})]
HAND_WRITTEN = [page for page in PAGES if page.name != "configuration.md"]  # that page is generated
TREE_START, TREE_END = "<!-- file tree -->\n", "<!-- end of file tree -->"
MAX_WORDS, MAX_LINES, MAX_MODULES = 2_000, 400, 20
MAX_WORDS_IN_PARENTHESES = 10
PROGRAMS = (
    "rebeca", "ray", "make", "python", "pytest", "pip", "source", "cd", "chmod", "export", "npm", "uvx",
    "tests/gpu/measure.sh",
)  # fmt: skip

# The last words of the plan that `make` prints for each target. The targets themselves install 8 GB.
PLANNED_TARGETS = {
    "demo": "rebeca demo",
    "test": "--no-loadscope-reorder",
    "lint": "lint-imports",
    "format": "ruff format .",
    "docs": "--config-file infra/mkdocs.yml",
    "faults": "--seed 1",
    "lock": "-o requirements.lock",
    "setup": ".ready",
    "audit": "--requirement requirements.lock",
    "sbom": "--output-file rebeca-ray.cdx.json",
}


def test_the_readme_is_short_and_its_status_is_on_the_first_screen() -> None:
    text = README.read_text()
    assert len(text.split()) <= MAX_WORDS
    assert text[: text.index("\n## Status\n")].count("\n") <= 12


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_relative_link_and_anchor_exists(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", without_blocks(page.read_text())):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name}: {target}"
        if anchor:
            assert anchor in anchors(file.read_text()), f"{page.name}: {target}"


def test_every_page_is_in_the_index_of_the_readme_or_of_the_site() -> None:
    linked = set(re.findall(r"\]\(infra/docs/([\w-]+\.md)\)", README.read_text()))
    linked |= set(re.findall(r"\]\(([\w-]+\.md)\)", (DOCS / "index.md").read_text()))
    assert linked == {page.name for page in PAGES if page.parent == DOCS}


def test_the_readme_lists_the_rooms_from_the_lowest_to_the_highest() -> None:
    section = README.read_text().split("\n## The rooms\n")[1].split("\n## ")[0]
    listed = re.findall(r"^\| `([\w.]+)/?` \| \S", section, re.MULTILINE)
    rooms = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
    rooms |= {path.name for path in PACKAGE.glob("*.py")} - {"__init__.py"}
    assert set(listed) == rooms
    height = {room: number for number, layer in enumerate(layers()) for room in layer}
    heights = [height[room.removesuffix(".py")] for room in listed]
    assert heights == sorted(heights)


def test_the_architecture_page_has_the_layers_of_the_contracts() -> None:
    block = ARCHITECTURE.read_text().split("The layers, from top to bottom:")[1].split("```")[1]
    listed = [set(re.findall(r"\w+", re.sub(r"\(.*", "", line))) for line in block.strip().splitlines()]
    assert listed == [set(layer) for layer in reversed(layers())]


def layers() -> list[list[str]]:
    """Return the layers of the import-linter contract, the lowest first."""
    settings = tomllib.loads((REPO / "pyproject.toml").read_text())["tool"]["importlinter"]
    (contract,) = [contract for contract in settings["contracts"] if contract["type"] == "layers"]
    return [re.findall(r"rebeca_ray\.(\w+)", layer) for layer in reversed(contract["layers"])]


def test_the_file_tree_matches_the_docstrings_of_the_modules() -> None:
    text = ARCHITECTURE.read_text()
    block = text.split(TREE_START)[1].split(TREE_END)[0]
    assert block == file_tree(), (
        "run `python -m tests.test_docs` to write the tree of infra/docs/architecture.md"
    )


def file_tree() -> str:
    """Return every module of the four code folders, with the first sentence of its docstring."""
    lines: list[str] = []
    for name in ("rebeca_ray", "jobs", "serving", "infra"):
        lines += tree_of(REPO / name)
    return "\n".join(["```", *lines, "```", ""])


def tree_of(folder: Path, depth: int = 0) -> Iterator[str]:
    if not list(folder.rglob("*.py")):
        return
    indent = "  " * depth
    yield f"{indent}{folder.name}/"
    for path in sorted(folder.glob("*.py")):
        yield f"{indent}  {path.name:<{24 - 2 * depth}} {first_sentence(path)}"
    for path in sorted(path for path in folder.iterdir() if path.is_dir()):
        yield from tree_of(path, depth + 1)


def first_sentence(path: Path) -> str:
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    assert docstring, f"{path}: a module needs a docstring"
    sentence = " ".join(docstring.split("\n\n")[0].split())
    return re.split(r"(?<=[.?]) (?=[A-Z`])", sentence)[0]


def test_the_cluster_page_lists_the_files_of_infra() -> None:
    section = (REPO / "infra" / "docs" / "cluster.md").read_text().split("\n## The files\n")[1]
    listed = re.findall(r"^\| `([\w.-]+)` \| \S", section, re.MULTILINE)
    assert sorted(listed) == sorted(path.name for path in (REPO / "infra").iterdir() if path.is_file())


def test_modules_are_short_and_folders_are_small() -> None:
    for path in PACKAGE.rglob("*.py"):
        assert len(path.read_text().splitlines()) <= MAX_LINES, path
    for folder in {path.parent for path in PACKAGE.rglob("*.py")}:
        modules = [path for path in folder.glob("*.py") if path.name != "__init__.py"]
        assert len(modules) <= MAX_MODULES, folder


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_documented_command_and_option_exists(page: Path) -> None:
    for command in [*block_commands(page), *inline_commands(page)]:
        check_command(shlex.split(command), f"{page.name}: {command}")


def check_command(words: list[str], where: str) -> None:
    program = words[0].rsplit("/", 1)[-1]
    for word in words[1:]:
        if re.fullmatch(r"(jobs|tests|serving|infra)/[\w/.]+\.(py|yaml)", word):
            assert (REPO / word).exists(), where
    if program == "rebeca":
        check_click(typer.main.get_command(app), words[1:], where)
    elif program == "ray":
        check_click(ray_command, words[1:], where)
    elif program == "make":
        makefile = (REPO / "Makefile").read_text()
        for target in words[1:]:
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), where
    elif program == "python" and words[1] == "-c":
        compile(words[2], where, "exec")
    elif program == "python":
        source = module_of(words)
        assert source.exists(), where
        options = [word.partition("=")[0] for word in words[2:] if word.startswith("--")]
        for option in options if "pytest" not in words else []:
            name = option.lstrip("-").replace("-", "_")
            assert option in source.read_text() or re.search(rf"\b{name}:", source.read_text()), where
    elif program == "pip":
        extras = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        for extra in re.findall(r"rebeca-ray\[(\w+)\]", " ".join(words)):
            assert extra in extras, where


def module_of(words: list[str]) -> Path:
    """Return the file that `python …` runs."""
    if words[1] != "-m":
        return REPO / words[1]
    if words[2] == "pytest":
        return REPO / "tests"
    module = REPO / words[2].replace(".", "/")
    return module / "__main__.py" if module.is_dir() else module.with_suffix(".py")


def check_click(command: Any, words: list[str], where: str) -> None:
    """Raise AssertionError for an unknown subcommand or option. A group's options may precede its command."""
    options = {"--help"} | {option for parameter in command.params for option in parameter.opts}
    while hasattr(command, "commands") and words:
        names = [word for word in words if word in command.commands]
        if words[0].startswith("-") and not names:
            break
        name = names[0] if words[0].startswith("-") else words[0]
        assert name in command.commands, where
        options |= {option for parameter in command.commands[name].params for option in parameter.opts}
        command, words = command.commands[name], [word for word in words if word != name]
    for word in words:
        if word == "--" or word.startswith("jobs/"):
            return  # the rest belongs to the job
        if word.startswith("--"):
            assert word.partition("=")[0] in options, where


def test_every_option_in_prose_exists() -> None:
    known = set(options_of(typer.main.get_command(app)))
    for page in PAGES:
        for option in re.findall(r"`(--[a-z][a-z-]+)`", without_blocks(page.read_text())):
            assert option in known, f"{page.name}: {option}"


def options_of(command: Any) -> Iterator[str]:
    for parameter in command.params:
        yield from parameter.opts
    for child in getattr(command, "commands", {}).values():
        yield from options_of(child)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_and_test_in_prose_exists(page: Path) -> None:
    named = r"`((?:rebeca_ray|tests|jobs|serving|infra)/[\w/.-]*[\w/])`"
    for path in re.findall(named, without_blocks(page.read_text())):
        assert (REPO / path).exists(), f"{page.name}: {path}"
    for name in re.findall(r"`(test_\w+)`", page.read_text()):
        assert any(f"def {name}(" in path.read_text() for path in (REPO / "tests").rglob("*.py")), name


@pytest.mark.parametrize(("target", "last"), PLANNED_TARGETS.items())
def test_make_plans_every_target(target: str, last: str) -> None:
    # A make above, such as `make test`, would pass its own options on.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    command = ["make", "--dry-run", target]
    plan = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True, check=False)
    assert plan.returncode == 0, plan.stderr
    last_line = plan.stdout.strip().splitlines()[-1]
    assert last_line.endswith(last) or "Nothing to be done" in last_line


def test_the_commands_of_the_readme_run(tmp_path: Path) -> None:
    """Run the README's commands as a shell script, with the bundled configs. Long commands are dry runs."""
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").write_text(f"PATH={Path(sys.executable).parent}:$PATH\n")
    (tmp_path / "mine").mkdir()
    for job in ("embed", "train", "generate"):
        text = (REPO / "jobs" / "configs" / f"{job}_stickers.yaml").read_text()
        (tmp_path / "mine" / f"{job}.yaml").write_text(text)
    golden = tmp_path / "mine" / "catalog"
    shutil.copytree(REPO / "tests" / "catalog" / "golden" / f"v{schemas.SCHEMA_VERSION}", golden)
    for path in golden.rglob("manifest.json"):  # the golden run has no forecast
        path.write_text(json.dumps({"forecast": {}, "actual": {}, **json.loads(path.read_text())}))
    script = ["set -e"]
    for command in block_commands(README):
        if command.startswith(("make ", "rebeca init ")):
            continue
        if command.startswith("rebeca") and "--config" in command and "--dry-run" not in command:
            command += " --dry-run"
        script.append(command)
    shell = ["bash", "-c", "\n".join(script)]
    ran = subprocess.run(shell, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert '"max_epochs": 50' in ran.stdout
    assert ran.stdout.count('"num_images": 10') == 2
    assert "2026-03-03" in ran.stdout  # the run date of the golden snapshot


def test_the_python_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the Python block on golden files. `tests/catalog/test_read.py` covers the line that needs Ray."""
    (code,) = re.findall(r"^```python\n(.*?)^```$", README.read_text(), re.MULTILINE | re.DOTALL)
    lines = [line for line in code.splitlines() if line]
    assert len(lines) <= 12
    golden = REPO / "tests" / "catalog" / "golden" / f"v{schemas.SCHEMA_VERSION}"
    user = read_catalog(str(golden)).items(["user_id"])["user_id"][-1].as_py()
    code = "\n".join(line for line in lines if "to_ray" not in line)
    monkeypatch.chdir(tmp_path)
    variables: dict[str, Any] = {}
    exec(code.replace("s3://bucket/catalog", str(golden)).replace("some-user", user), variables)
    assert variables["items"].num_rows > 0
    assert Path("first.webp").read_bytes() == variables["images"][0]


def test_no_placeholder_stands_for_a_figure() -> None:
    for page in HAND_WRITTEN:
        placeholders = r"\b[A-Z]+(?:_[A-Z0-9]+)+\b(?=[ ;,]? ?(?:s|ms|kB|MB|\||;))"
        assert not re.findall(placeholders, page.read_text()), page.name


@pytest.mark.parametrize("page", HAND_WRITTEN, ids=lambda page: page.name)
def test_the_prose_keeps_the_rules_of_plain_english(page: Path) -> None:
    problems = [
        f"{rule}: {sentence}" for sentence in sentences(page.read_text()) for rule in broken_rules(sentence)
    ]
    assert not problems, "\n".join(problems)


def broken_rules(sentence: str) -> Iterator[str]:
    if sentence.count(";") > 1:
        yield "more than one semicolon"
    if any(
        len(inside.split()) > MAX_WORDS_IN_PARENTHESES for inside in re.findall(r"\(([^()]*)\)", sentence)
    ):
        yield "a long parenthesis"
    clause = r"(^|[,;:] )(what|who|whose)\b|\b(of|in|for|to|on|at|by|from|with) (which|whom|whose|what)\b"
    if re.search(clause, sentence, re.IGNORECASE) and not sentence.endswith("?"):
        yield "a clause that starts like a question"
    if re.search(r"\bit (is|was) \w+ that\b", sentence, re.IGNORECASE):
        yield "it is … that"


def sentences(text: str) -> Iterator[str]:
    """Yield the sentences outside code blocks.

    A list item or a table cell ends a sentence. Code and italics count as one word each.
    """
    text = without_blocks(text)
    text = re.sub(r"<!--.*?-->", "", text)
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"`[^`]*`", "code", text)
    text = re.sub(r"(?<![*\w])\*(?!\*)[^*\n]+\*(?!\*)", "word", text)
    text = re.sub(r"^\s*(?:[-*]|\d+\.)\s+", "\n\n", text, flags=re.MULTILINE)
    text = re.sub(r"^\|(.*)\|$", lambda row: "\n\n" + row[1].replace("|", "\n\n"), text, flags=re.MULTILINE)
    text = re.sub(r"^#+ (.*)$", r"\1\n", text, flags=re.MULTILINE)
    for paragraph in re.split(r"\n\s*\n", text):
        yield from filter(None, re.split(r"(?<=[.!?:])\s+", " ".join(paragraph.split())))


def without_blocks(text: str) -> str:
    return re.sub(r"^ *```.*?^ *```$", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(text: str) -> set[str]:
    """Return the anchors that GitHub makes of the headings."""
    headings = re.findall(r"^#+ (.*)$", without_blocks(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def block_commands(page: Path) -> Iterator[str]:
    """Yield the shell commands in the blocks of a page, without comments and extra spaces."""
    blocks = re.findall(r"^ *```(\w*)\n(.*?)^ *```$", page.read_text(), re.MULTILINE | re.DOTALL)
    shell = "".join(text for language, text in blocks if language in ("", "bash"))
    for line in shell.replace("\\\n", " ").splitlines():
        for command in re.sub(r"\s+#.*", "", line).split(" && "):
            words = command.split()
            if words and words[0].rsplit("/", 1)[-1] in PROGRAMS:
                yield " ".join(words)


def inline_commands(page: Path) -> Iterator[str]:
    for command in re.findall(r"`([^`\n]+)`", without_blocks(page.read_text())):
        shown_on_the_page = command.startswith("python example.py")
        if command.split()[0] in PROGRAMS and len(command.split()) > 1 and not shown_on_the_page:
            yield command.split(" | ")[0]


def write_file_tree() -> None:
    head, _, rest = ARCHITECTURE.read_text().partition(TREE_START)
    ARCHITECTURE.write_text(head + TREE_START + file_tree() + TREE_END + rest.partition(TREE_END)[2])


if __name__ == "__main__":
    write_file_tree()
