"""Load a config: YAML, `key.sub=value` overrides, one-line errors."""

import re
import typing
from pathlib import Path
from textwrap import shorten
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from rebeca_ray.config.fields import SECRET, Settings, section_of
from rebeca_ray.errors import InputError, did_you_mean, shown

C = TypeVar("C", bound=Settings)
MAX_BYTES = 100_000  # of a config
MAX_LEVELS = 10  # of sections in an override; the deepest there is has three


def load_config(model: type[C], path: str | Path, overrides: list[str] | None = None) -> C:
    """Read `path` (YAML), apply `key.sub=value` overrides, and check everything.

    A section may be the name of a file beside `path`. Raises InputError with the key, its value, and the
    nearest known key or the expected value.
    """
    path = Path(path)
    values = read_values(path)
    for name, value in values.items():
        if isinstance(value, str) and name in model.model_fields and section_of(model, name) is not None:
            values[name] = read_values(path.parent / value)
    return with_overrides(model, values, overrides, where=str(path))


def with_overrides(model: type[C], values: dict[str, Any], overrides: list[str] | None, *, where: str) -> C:
    """Build `model` from plain values and `key.sub=value` overrides. Raises as `parse_config` does."""
    for override in overrides or []:
        apply_override(values, override)
    return parse_config(model, values, where=where)


def read_values(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file."""
    try:
        with path.open("rb") as file:
            text = file.read(MAX_BYTES + 1).decode()
    except OSError as error:
        raise InputError(
            f"config {str(path)[-300:]}: cannot be read ({error.strerror}); "
            "give an existing YAML file to --config"
        ) from None
    except ValueError as error:
        raise InputError(f"config {path}: not valid YAML ({error}); save it as UTF-8 text") from None
    values = read_yaml(text, where=f"config {path}")
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise InputError(
            f"config {path}: found {type(values).__name__} at the top, expected a mapping of settings"
        )
    return values


class ConfigLoader(yaml.SafeLoader):
    """YAML with dates and the scalars of version 1.2, but without repeated keys and aliases."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):  # a few lines of them can stand for billions of values
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(problem="found an alias, write the value itself", problem_mark=mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.MarkedYAMLError(
                        problem=f"key {shown(key.value)} appears twice, keep one",
                        problem_mark=key.start_mark,
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


SCALARS = (  # kind, pattern, first characters
    ("null", r"|~|null|Null|NULL", ["", *"~nN"]),
    ("bool", r"true|True|TRUE|false|False|FALSE", [*"tTfF"]),
    ("int", r"[-+]?(0|[1-9][0-9]*)", [*"-+0123456789"]),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?", [*"-+.0123456789"]),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", [*"-+."]),
    ("timestamp", r"[0-9]{4}-[0-9]{2}-[0-9]{2}", [*"0123456789"]),
)
ConfigLoader.yaml_implicit_resolvers = {}
for scalar, pattern, beginnings in SCALARS:
    ConfigLoader.add_implicit_resolver(
        f"tag:yaml.org,2002:{scalar}", re.compile(f"^(?:{pattern})$"), beginnings
    )


def read_yaml(text: str, *, where: str) -> Any:
    """Return the values in a YAML text. Raises InputError, in one line, for any other text."""
    if len(text) > MAX_BYTES:
        raise InputError(f"{where}: is longer than {MAX_BYTES:,} characters; give a file of settings")
    try:
        return yaml.load(text, ConfigLoader)
    except RecursionError:
        raise InputError(
            f"{where}: not valid YAML (nested too deeply); sections go three levels down"
        ) from None
    # The last three are values that do not fit their tag.
    except (yaml.YAMLError, ValueError, LookupError, AttributeError) as error:
        raise InputError(
            f"{where}: not valid YAML ({describe(error)}); mend that line, or quote the value"
        ) from None


def describe(error: Exception) -> str:
    """Return PyYAML's error and its position in one line."""
    mark = error.problem_mark if isinstance(error, yaml.MarkedYAMLError) else None
    problem = error.problem if isinstance(error, yaml.MarkedYAMLError) else error
    return shorten(str(problem), 200, placeholder=" …") + (
        f" in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
    )


def apply_override(values: dict[str, Any], override: str) -> None:
    """Set one `key.sub=value` in a nested mapping. The value is read as YAML."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise InputError(f"override {shown(override)}: expected key.sub=value")
    *parents, leaf = key.split(".")
    if len(parents) > MAX_LEVELS:
        raise InputError(
            f"override {shown(override)}: goes {len(parents):,} sections deep; sections go three levels down"
        )
    for parent in parents:
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise InputError(f"override {shown(override)}: {parent} is a value, not a section")
    values[leaf] = read_yaml(text, where=f"override {shown(override)}")


def parse_config(model: type[C], values: dict[str, Any], *, where: str) -> C:
    """Build `model` from plain values. Raises InputError, in one line, for the first mistake."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        # A misspelt key is reported before the missing key that it meant.
        first = min(error.errors(), key=lambda mistake: mistake["type"] != "extra_forbidden")
        path = [str(part) for part in first["loc"]]
        key, value = ".".join(path), "***" if first["type"] == SECRET else shown(first["input"])
        if first["type"] == "extra_forbidden":
            *parents, leaf = path
            suggestion = did_you_mean(leaf, section_at(model, parents).model_fields)
            raise InputError(f"{where}: unknown key {shown(key)}; {suggestion}") from None
        if first["type"] == "missing" and isinstance(first["loc"][-1], str):
            raise InputError(f"{where}: key {key!r} is missing; set it in the file or as {key}=…") from None
        if first["type"] == "model_type":
            keys = shorten(", ".join(section_at(model, path).model_fields), 200, placeholder=" …")
            raise InputError(
                f"{where}: {key} is a section, not the value {value}; set one of its keys ({keys})"
            ) from None
        raise InputError(
            f"{where}: {shown(key)[1:-1]} = {value}: {first['msg'].removeprefix('Value error, ').lower()}"
        ) from None


def section_at(model: type[Settings], parents: list[str]) -> type[Settings]:
    """Return the settings class of the section at the path `parents` below `model`."""
    for parent in parents:
        model = typing.cast(type[Settings], section_of(model, parent))
    return model
