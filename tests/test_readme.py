"""The README stays true: every module in its tree, every path, make target and `rebeca` command it names."""

import re
from pathlib import Path

from typer import Typer

from rebeca_ray.cli.commands import app

REPO = Path(__file__).parents[1]
README = (REPO / "README.md").read_text()


def test_every_module_stands_in_the_tree_with_one_line() -> None:
    tree = README.split("## The tree")[1].split("\n## ")[0]
    named = set(re.findall(r"^\s*([\w./]+\.py)\s{2,}\S", tree, re.MULTILINE))
    modules = {path.name for folder in ("jobs", "serving") for path in (REPO / folder).glob("*.py")}
    modules |= {path.name for path in (REPO / "rebeca_ray").rglob("*.py")}
    assert {Path(name).name for name in named} == modules
    manifests = set(
        re.findall(r"^  ([\w.-]+(?:Dockerfile|dockerignore|yaml|md))\s{2,}\S", tree, re.MULTILINE)
    )
    assert manifests == {path.name for path in (REPO / "infra").iterdir()}


def test_every_relative_link_and_picture_exists() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (REPO / target).exists(), target


def test_every_figure_stands_in_its_place() -> None:
    assert not re.findall(r"\b[A-Z]+(?:_[A-Z0-9]+)+\b(?=[ ;,]? ?(?:s|ms|kB|MB|\||;))", README)


def test_every_command_named_is_there() -> None:
    makefile = (REPO / "Makefile").read_text()
    for target in set(re.findall(r"`?make ([a-z]+)`?", README)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for path in set(re.findall(r"(?:jobs|tests)/[\w/]+\.(?:py|yaml)", README)):
        assert (REPO / path).exists(), path
    commands = {
        command.name or command.callback.__name__ for command in app.registered_commands if command.callback
    }
    groups = {group.name: names_of(group.typer_instance) for group in app.registered_groups}
    (exports,) = next(
        group for group in app.registered_groups if group.name == "catalog"
    ).typer_instance.registered_groups
    groups["catalog"].add("export")
    for first, second, third in set(
        re.findall(r"(?:^|`)rebeca ([a-z]+)(?: +([a-z-]+))?(?: +([a-z-]+))?", README, re.MULTILINE)
    ):
        assert first in commands or second in groups[first], (first, second)
        assert second != "export" or third in names_of(exports.typer_instance), third


def names_of(commands: Typer) -> set[str]:
    return {
        command.name or command.callback.__name__.replace("_", "-")
        for command in commands.registered_commands
        if command.callback
    }


def test_no_module_is_over_400_lines() -> None:
    for path in (REPO / "rebeca_ray").rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 400, path
