"""Bounded kinds of fields, and the base of every section."""

import datetime
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    field_validator,
)

from rebeca_ray.storage.store import normalize

PACKAGE = Path(__file__).parents[1]  # the installed rebeca_ray


def expand(location: str) -> str:
    """Resolve `~`, and `package:` (a folder inside the installed rebeca_ray), also behind open_clip's `local-dir:`."""
    scheme = "local-dir:" if location.startswith("local-dir:") else ""
    path = location.removeprefix(scheme)
    if path.startswith("package:"):
        return f"{scheme}{PACKAGE / path.removeprefix('package:')}"
    if not path.startswith("~"):
        return location
    found = os.path.expanduser(path)
    if found == path:
        raise ValueError("names a home folder that is not there; give a whole path")
    return f"{scheme}{found}"


def absolute(location: str) -> str:
    """Return a local path from the root, because workers have another working directory.

    A URI gets its one spelling (`s3a://` becomes `s3://`, `file:///a` becomes `/a`).
    """
    location = normalize(expand(location))
    return location if "://" in location else os.path.abspath(location)


def as_typed(value: Any) -> Any:
    """An id that YAML took for a number or a date, as it was typed."""
    return str(value) if type(value) in (int, datetime.date) else value


Location = Annotated[str, AfterValidator(absolute)]
ModelName = Annotated[str, AfterValidator(expand)]  # a hub id, or a directory that every node sees
Identifier = Annotated[str, Field(max_length=100, pattern=r"^[A-Za-z0-9_.-]+$"), BeforeValidator(as_typed)]
Count = Annotated[int, Field(ge=0, le=10**9)]
Positive = Annotated[int, Field(gt=0, le=10**9)]
Few = Annotated[int, Field(gt=0, le=1000)]  # layers, actors, attempts
Size = Annotated[int, Field(gt=0, le=65_536)]  # of a batch, a layer
Pixels = Annotated[int, Field(gt=0, le=8192)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]
MAX_IMAGES = 32_767  # a rank is an int16
Share = Annotated[float, Field(ge=0, lt=1)]
Part = Annotated[float, Field(ge=0, le=1)]
LearningRate = Annotated[float, Field(gt=0, le=1e6)]
Ratio = Annotated[float, Field(ge=0, le=10)]
Scale = Annotated[float, Field(ge=1, le=1000)]  # of guidance; 1 is none
Rating = Annotated[float, Field(ge=-1e6, le=1e6)]
Price = Annotated[float, Field(ge=0, le=1e6)]
Span = Annotated[float, Field(gt=0, le=10**7)]  # of time, in the unit its name says
Cpus = Annotated[
    float, Field(gt=0, le=1000, description="CPUs reserved an actor; leave one of the cluster's for reading")
]
Device = Literal["cpu", "cuda"]


class Settings(BaseModel):
    """Base of every config section: frozen, and closed to unknown keys, other types, endless numbers and texts that are none."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, str_min_length=1, str_max_length=4096
    )

    @field_validator("*", mode="before")
    @classmethod
    def is_one_line(cls, value: Any) -> Any:
        if isinstance(value, str) and re.search(r"[\x00-\x1f]", value):
            raise ValueError("holds a NUL, a line break or another control character; leave it out")
        return value
