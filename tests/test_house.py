"""House rules beyond the linters: forbidden names, long lines, many arguments, docstrings, untyped dicts.

`python -m tests.test_house` lists every violation.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

REPO = Path(__file__).parents[1]
PACKAGE = REPO / "rebeca_ray"
FORBIDDEN_NAMES = {"told", "found", "own", "there", "wanted", "asked"}
MAX_LINE, MAX_ARGUMENTS, MAX_UNTYPED_DICTS = 110, 7, 40
UNTYPED_DICT = "dict[str, Any]"
PACKAGE_DOCSTRING = re.compile(
    r"\A[^\n]+\n\s*May import: [^\n]+\n(?:[^\n]+\n)?Must not hold: [^\n]+", re.MULTILINE
)


def test_no_name_is_forbidden() -> None:
    violations = list(forbidden_names())
    assert not violations, "\n".join(violations)


def test_lines_are_short() -> None:
    violations = list(long_lines())
    assert not violations, "\n".join(violations)


def test_functions_take_few_arguments() -> None:
    violations = list(functions_of_many_arguments())
    assert not violations, "\n".join(violations)


def test_every_package_docstring_has_three_lines() -> None:
    violations = list(packages_without_their_three_lines())
    assert not violations, "\n".join(violations)


def test_dicts_have_types() -> None:
    uses = list(untyped_dicts())
    assert len(uses) <= MAX_UNTYPED_DICTS, "\n".join(uses)


def modules(*folders: Path) -> Iterator[tuple[Path, ast.Module]]:
    for folder in folders:
        for path in sorted(folder.rglob("*.py")):
            yield path, ast.parse(path.read_text())


def forbidden_names() -> Iterator[str]:
    """Yield each use of a forbidden word as a name in the code."""
    for path, tree in modules(PACKAGE, REPO / "tests"):
        for node in ast.walk(tree):
            for name in FORBIDDEN_NAMES & set(names_of(node)):
                yield f"{path.relative_to(REPO)}:{getattr(node, 'lineno', 0)}: name {name!r}"


def names_of(node: ast.AST) -> Iterator[str]:
    match node:
        case ast.Name(id=name) | ast.Attribute(attr=name) | ast.arg(arg=name):
            yield name
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
            yield name
        case ast.keyword(arg=str(name)) | ast.alias(asname=str(name)):
            yield name
        case ast.ExceptHandler(name=str(name)) | ast.MatchAs(name=str(name)) | ast.MatchStar(name=str(name)):
            yield name


def long_lines() -> Iterator[str]:
    for path in sorted(PACKAGE.rglob("*.py")):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if len(line) > MAX_LINE:
                yield f"{path.relative_to(REPO)}:{number}: {len(line)} characters, at most {MAX_LINE}"


def functions_of_many_arguments() -> Iterator[str]:
    for path, tree in modules(PACKAGE):
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                number = len([argument for argument in arguments if argument.arg not in ("self", "cls")])
                if number > MAX_ARGUMENTS:
                    where = f"{path.relative_to(REPO)}:{node.lineno}"
                    yield f"{where}: {node.name} takes {number} arguments, at most {MAX_ARGUMENTS}"


def packages_without_their_three_lines() -> Iterator[str]:
    """Yield the rooms without the three lines. The root package is exempt."""
    for path in sorted(PACKAGE.glob("*/**/__init__.py")):
        docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
        if not PACKAGE_DOCSTRING.match(re.sub(r"\n\n", "\n", docstring)):
            yield f"{path.relative_to(REPO)}: needs its purpose, 'May import: …' and 'Must not hold: …'"


def untyped_dicts() -> Iterator[str]:
    for path in sorted(PACKAGE.rglob("*.py")):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            for _ in range(line.count(UNTYPED_DICT)):
                yield f"{path.relative_to(REPO)}:{number}: {UNTYPED_DICT}"


def list_violations() -> None:
    for rule in (
        forbidden_names,
        long_lines,
        functions_of_many_arguments,
        packages_without_their_three_lines,
    ):
        violations = list(rule())
        print(f"\n{rule.__name__.replace('_', ' ')}: {len(violations)}", *violations, sep="\n  ")
    uses = list(untyped_dicts())
    print(f"\nuntyped dicts: {len(uses)}, at most {MAX_UNTYPED_DICTS}", *uses, sep="\n  ")


if __name__ == "__main__":
    list_violations()
