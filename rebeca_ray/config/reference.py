"""Print `infra/docs/configuration.md` for `make docs`: a row of a table for every setting."""

import inspect
import math
import sys
from collections.abc import Iterator
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from rebeca_ray.config.decoder import web_address
from rebeca_ray.config.evaluation import EvaluateConfig
from rebeca_ray.config.fields import (
    Effect,
    Settings,
    absolute,
    as_hexadecimal,
    as_typed,
    effect_of,
    expand,
    key_source,
    section_of,
)
from rebeca_ray.config.jobs import (
    DistillConfig,
    EmbedConfig,
    GenerateConfig,
    NightlyConfig,
    SampleConfig,
    TrainConfig,
)
from rebeca_ray.config.presets import PRESETS
from rebeca_ray.config.telemetry import hook_address, variable
from rebeca_ray.config.tuning import TuneConfig

JOBS: tuple[type[Settings], ...] = (
    EmbedConfig,
    TrainConfig,
    DistillConfig,
    GenerateConfig,
    NightlyConfig,
    SampleConfig,
    EvaluateConfig,
    TuneConfig,
)
KINDS = {bool: "true or false", int: "whole number", float: "number", str: "text"}
CHECKED = {
    absolute: "location",
    expand: "model name",
    as_typed: "identifier",
    as_hexadecimal: "colour",
    key_source: "file or env:NAME",
    web_address: "web address",
    hook_address: "web address or env:NAME",
    variable: "env:NAME",
}
COMPARISONS = {"ge": "of at least", "gt": "above", "le": "at most", "lt": "below"}
INTRODUCTION = """\
# Configuration

This page is generated from the models in `rebeca_ray/config/`. Run `make docs` after a change.

## How a config is read

- **YAML.** `rebeca generate --config generate.yaml` reads one YAML file. `jobs/configs/` has an example per
  job. `1e-4` is a number, `2026-03-01` a date, and only `true` and `false` are booleans.
- **Sections.** A section is a mapping in the file, or the name of a YAML file beside it: `embed: embed.yaml`.
- **Overrides.** Arguments `key.sub=value` replace values of the file, and are read as YAML:
  `rebeca generate --config generate.yaml decoder.batch_size=32`.
- **Locations.** A location is a local path, or an `s3://`, `gs://` or `abfss://` address.
  `~` is the home folder, and `package:` the installed `rebeca_ray`: `package:stickers/assets/decoder`.
  A relative path starts at the working directory.
  A model name is a hub id, or a directory that every node sees.
- **Dates.** `rebeca generate` and `rebeca nightly` replace `{run_date}` in a path by the snapshot's date.
- **Presets.** `preset` in a training config fills sections with the values below. The config overrides them.
- **Strictness.** An unknown key is refused, and the nearest known key suggested. A value of another type or
  out of bounds, a repeated key and a YAML alias are refused too. The job ends in one line, with exit code 2.
- **Dry run.** `--dry-run` prints the complete config with every default, and stops.
"""


def page() -> Iterator[str]:
    """Yield the lines of the page."""
    yield from INTRODUCTION.splitlines()
    yield from (
        "",
        "## Effects",
        "",
        "The column *effect* says which part of the work a setting changes.",
        "",
    )
    table = inspect.cleandoc(Effect.__doc__ or "").partition("\n\n")[2]
    yield from table.splitlines()
    yield from ("", "## Jobs")
    for model in JOBS:
        yield from describe(model)
    yield from ("", "## Sections")
    for section, fields in find_sections().items():
        yield from describe(section, f"Section {', '.join(fields)}. ")
    yield from ("", "## Presets")
    for preset, sections in PRESETS.items():
        yield from ("", f"### {preset}", "", "| setting | value |", "|---|---|")
        for key, values in sections.items():
            yield from (f"| `{key}.{name}` | {plain(value)} |" for name, value in values.items())


def find_sections() -> dict[type[Settings], list[str]]:
    """Return every section of the jobs and of their sections, with the fields that hold it."""
    sections: dict[type[Settings], list[str]] = {}
    queue: list[type[Settings]] = list(JOBS)
    while queue:
        model = queue.pop(0)
        for name in model.model_fields:
            section = section_of(model, name)
            if section and section not in JOBS:
                queue += [] if section in sections else [section]
                sections.setdefault(section, []).append(f"`{name}` of {model.__name__}")
    return sections


def describe(model: type[Settings], intro: str = "") -> Iterator[str]:
    """Yield the heading of a model, the first line of its docstring, and a table of its fields."""
    summary = inspect.cleandoc(model.__doc__ or "").partition("\n")[0]
    yield from ("", f"### {model.__name__}", "", f"{intro}{summary}", "")
    yield from ("| setting | type and bounds | default | effect | description |", "|---|---|---|---|---|")
    for name, field in model.model_fields.items():
        section = section_of(model, name)
        kind = f"[{section.__name__}](#{section.__name__.lower()})" if section else words(field)
        effect = "by field" if section else effect_of(model, name)
        description = " ".join((field.description or "").split())
        cells = (f"`{name}`", kind, default_of(field), effect, description)
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def default_of(field: FieldInfo) -> str:
    """Return the default of a field in words."""
    if field.is_required():
        return "required"
    return "its defaults" if isinstance(field.default, Settings) else plain(field.default)


def plain(value: Any) -> str:
    """Return a value as YAML has it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, str):
        return f"`{value}`"
    return f"[{', '.join(map(plain, value))}]" if isinstance(value, tuple) else f"{value:.12g}"


def words(field: FieldInfo) -> str:
    """Return the type of a field and its bounds in words."""
    return words_of(field.annotation, field.metadata)


def words_of(kind: Any, metadata: list[Any]) -> str:
    """Return a type and its bounds in words."""
    null = ""
    while (origin := get_origin(kind)) in (Annotated, Union, UnionType):
        first, *rest = (part for part in get_args(kind) if part is not NoneType)
        null = null if origin is Annotated else "null, or "
        kind, metadata = first, [*metadata, *rest]
    if origin is Literal:
        *others, last = map(plain, get_args(kind))
        return f"{null}{', '.join(others)} or {last}"
    if origin is tuple:
        first, last = get_args(kind)  # a pair, or any number of the first
        return f"list of: {words_of(first, [])}" if last is Ellipsis else "list of 2 numbers"
    checks = (CHECKED.get(getattr(mark, "func", None)) for mark in metadata)  # type: ignore[arg-type]
    name = next(filter(None, checks), KINDS.get(kind, "date"))
    return null + name + bounds(kind, metadata)


def bounds(kind: Any, metadata: list[Any]) -> str:
    """Return the bounds of a number or a text in words."""
    # A `Field` in a union is a mark whose own metadata are the bounds.
    marks = [inner for mark in metadata for inner in getattr(mark, "metadata", [mark])]
    limits = {
        name: value
        for mark in marks
        for name in (*COMPARISONS, "multiple_of", "max_length")
        if (value := getattr(mark, name, None)) is not None
    }
    if kind is int:
        low = max(limits.get("ge", -math.inf), limits.get("gt", -math.inf) + 1)
        high = min(limits.get("le", math.inf), limits.get("lt", math.inf) - 1)
        step = f", a multiple of {limits['multiple_of']}" if "multiple_of" in limits else ""
        return f" from {low:,} to {high:,}{step}"
    if kind is float:
        return " " + " and ".join(f"{COMPARISONS[name]} {limits[name]:,.12g}" for name in limits)
    return f" of at most {limits['max_length']} characters" if "max_length" in limits else ""


if __name__ == "__main__":
    sys.stdout.write("\n".join(page()) + "\n")
