"""Bounded kinds of fields, the effect of a field, and the base of every section."""

import datetime
import os
import re
import typing
from collections.abc import Collection
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal

from PIL import ImageColor
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, field_validator

from rebeca_ray.storage.store import normalize

PACKAGE = Path(__file__).parents[1]  # the installed rebeca_ray


def expand(location: str) -> str:
    """Resolve `~` and `package:` in a location, also behind open_clip's `local-dir:`.

    `package:` is the installed rebeca_ray. Raises ValueError if the home folder is unknown.
    """
    scheme = "local-dir:" if location.startswith("local-dir:") else ""
    path = location.removeprefix(scheme)
    if path.startswith("package:"):
        return f"{scheme}{PACKAGE / path.removeprefix('package:')}"
    if not path.startswith("~"):
        return location
    expanded = os.path.expanduser(path)
    if expanded == path:
        raise ValueError("names an unknown home folder; give an absolute path")
    return f"{scheme}{expanded}"


def absolute(location: str) -> str:
    """Return a local path as absolute, because workers run in another directory.

    A URI gets its one spelling (`s3a://` becomes `s3://`, `file:///a` becomes `/a`).
    """
    location = normalize(expand(location))
    return location if "://" in location else os.path.abspath(location)


def key_source(value: str) -> str:
    """Return `env:NAME` as it is, and a path as absolute. Raises ValueError for anything else."""
    if value.startswith("env:"):
        if not re.fullmatch(r"env:[A-Za-z_][A-Za-z0-9_]*", value):
            raise ValueError("names no environment variable; give env:NAME")
        return value
    if "-----BEGIN" in value:
        raise ValueError("is the text itself, which a config must not hold; give a file, or env:NAME")
    path = absolute(value)
    if "://" in path:
        raise ValueError("is no local file; give a file that is on every node, or env:NAME")
    return path


def as_typed(value: Any) -> Any:
    """Return an identifier as a person typed it, where YAML read a number or a date."""
    return str(value) if type(value) in (int, datetime.date) else value


def as_hexadecimal(colour: str) -> str:
    """Return a colour as `#rrggbb`. Raises ValueError for anything but an opaque colour."""
    try:
        red, green, blue, *opacity = bytes(ImageColor.getrgb(colour))
    except ValueError:
        opacity = [0]
    if opacity:
        raise ValueError("is no opaque colour; give a name such as white, or '#rrggbb' in quotes")
    return f"#{red:02x}{green:02x}{blue:02x}"


def fraction_or_whole(value: float) -> float:
    """Return the value. Raises ValueError for a number from 1 on with a fraction."""
    if value >= 1 and not value.is_integer():
        raise ValueError("is neither a fraction below 1 nor a whole number; give one of them")
    return value


SECRET = "secret"  # the type of an error that must not show the value
MAX_IMAGES = 32_767  # a rank is an int16
Location = Annotated[str, AfterValidator(absolute)]
KeySource = Annotated[str, AfterValidator(key_source)]  # of a secret, which no config holds
ModelName = Annotated[str, AfterValidator(expand)]  # a hub id, or a directory on every node
Identifier = Annotated[str, Field(max_length=100, pattern=r"^[A-Za-z0-9_.-]+$"), BeforeValidator(as_typed)]
Count = Annotated[int, Field(ge=0, le=10**9)]
Positive = Annotated[int, Field(gt=0, le=10**9)]
SmallCount = Annotated[int, Field(gt=0, le=1000)]  # layers, actors, attempts
Size = Annotated[int, Field(gt=0, le=65_536)]  # of a batch, a layer
Pixels = Annotated[int, Field(gt=0, le=8192)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]
FractionBelow1 = Annotated[float, Field(ge=0, lt=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]
HoldOut = Annotated[float, Field(ge=0, le=1e6), AfterValidator(fraction_or_whole)]
LearningRate = Annotated[float, Field(gt=0, le=1e6)]
Weight = Annotated[float, Field(ge=0, le=10)]
Scale = Annotated[float, Field(ge=1, le=1000)]  # of guidance; 1 means none
GuidanceWeight = Annotated[float, Field(ge=0, le=100_000)]  # of the selector; 0 means none
Rating = Annotated[float, Field(ge=-1e6, le=1e6)]
Price = Annotated[float, Field(ge=0, le=1e6)]
Duration = Annotated[float, Field(gt=0, le=10**7)]  # in the unit that the field's name gives
Cpus = Annotated[float, Field(gt=0, le=1000)]
Colour = Annotated[str, AfterValidator(as_hexadecimal)]
Device = Literal["cpu", "cuda"]


class Effect(StrEnum):
    """The effect of a setting, marked on its field: `batch_size: Annotated[Size, Effect.PLAN] = 16`.

    | effect | a change of the setting changes | item identity | compared on resume | sent to a server |
    |---|---|---|---|---|
    | item | the generated items | yes | yes | yes |
    | variant | the variants of requested items | in the keys of variants alone | yes | yes |
    | content | the location of an input or model | by its content | yes | yes |
    | plan | the shape of a run, the mark of files, or rounding of floats | no | yes | yes |
    | client | the process that decodes | no | yes | no |
    | speed | time and resources | no | no | no |
    | nothing | no item: only publishing, prices and schedules | no | no | no |

    *Item identity* covers a decoder's fingerprint, the keys of a plan and the name of a training run.
    A section has no mark (*by field* in the tables), because its fields have theirs.
    """

    ITEM = "item"
    VARIANT = "variant"
    CONTENT = "content"
    PLAN = "plan"
    CLIENT = "client"
    SPEED = "speed"
    NOTHING = "nothing"


NOT_IN_IDENTITY = frozenset(Effect) - {Effect.ITEM}
NOT_COMPARED = frozenset({Effect.SPEED, Effect.NOTHING})
NOT_SERVED = frozenset({Effect.CLIENT, Effect.SPEED, Effect.NOTHING})


class Settings(BaseModel):
    """The base of every config section: frozen and strict.

    It refuses unknown keys, wrong types, infinite numbers, empty texts and control characters.
    A string below a field is the field's description.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        str_min_length=1,
        str_max_length=4096,
        use_attribute_docstrings=True,
    )

    @field_validator("*", mode="before")
    @classmethod
    def refuse_control_characters(cls, value: Any) -> Any:
        texts = value if isinstance(value, list | tuple) else [value]
        if any(isinstance(text, str) and re.search(r"[\x00-\x1f]", text) for text in texts):
            raise ValueError("holds a NUL, a line break or another control character; leave it out")
        return value

    def identity_json(self) -> str:
        """Return as JSON the settings that an item's identity includes."""
        return self.model_dump_json(exclude=fields_with(type(self), NOT_IN_IDENTITY))


def section_of(model: type[Settings], name: str) -> type[Settings] | None:
    """Return the settings class of a field, or None if the field holds a value."""
    annotation: Any = model.model_fields[name].annotation
    candidates = [annotation, *typing.get_args(annotation)]
    return next((kind for kind in candidates if isinstance(kind, type) and issubclass(kind, Settings)), None)


def effect_of(model: type[Settings], name: str) -> Effect:
    """Return the mark of a field that holds a value. Raises ValueError without exactly one mark."""
    marks = [mark for mark in model.model_fields[name].metadata if isinstance(mark, Effect)]
    if len(marks) != 1:
        raise ValueError(f"{model.__name__}.{name} has {len(marks)} marks; give it one Effect")
    return marks[0]


def fields_with(model: type[Settings], effects: Collection[Effect]) -> dict[str, Any]:
    """Return the fields with one of `effects` as an `exclude` mapping for `model_dump`.

    A section maps to the mapping of its fields, or to True if every field has one of the effects.
    """
    chosen: dict[str, Any] = {}
    for name in model.model_fields:
        section = section_of(model, name)
        if section is None:
            if effect_of(model, name) in effects:
                chosen[name] = True
        elif inner := fields_with(section, effects):
            whole = inner.keys() == section.model_fields.keys() and all(v is True for v in inner.values())
            chosen[name] = True if whole else inner
    return chosen
