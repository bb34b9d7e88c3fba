"""Spoil valid files: bytes are flipped, cut, repeated or inserted, values get another type or size."""

import copy
import json
import math
from typing import Any

import yaml
from hypothesis import strategies as st

ODD_VALUES: list[Any] = [
    *(None, True, 0, -1, 3.5, 2**31, 2**63, 10**400, 1e308, math.nan, -math.inf),
    *("", "x", "1", "\0", "\ud800", "é" * 5000, "../../x", "/etc/passwd", "s3://b/x", "2026-13-45"),
    *([], {}, [[]], {"a": 1}, [None] * 100, {"": {"": {}}}),
]
POSITIONS = st.floats(0, 1, exclude_max=True)
CHANGES = ("flip", "cut", "drop", "repeat", "insert", "zero")


@st.composite
def spoilt_bytes(draw: st.DrawFn, valid: bytes) -> bytes:
    """Draw a file with one to three changes of its bytes."""
    data = bytearray(valid)
    for _ in range(draw(st.integers(1, 3))):
        start = int(draw(POSITIONS) * len(data))
        length = draw(st.sampled_from([1, 2, 8, 100]))
        match draw(st.sampled_from(CHANGES)):
            case "flip" if data:
                data[start] ^= 1 << draw(st.integers(0, 7))
            case "cut":
                del data[start:]
            case "drop":
                del data[start : start + length]
            case "repeat":
                data[start:start] = data[start : start + length] * draw(st.sampled_from([1, 5, 1000]))
            case "insert":
                data[start:start] = draw(st.sampled_from([b"\0", b"[" * 5000, b"\xff" * 8, b"{", b'"', b"-"]))
            case _:
                data[start : start + length] = bytes(len(data[start : start + length]))
    return bytes(data)


def paths_in(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the paths of all values inside a structure."""
    keys = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    inner = [inside for key in keys for inside in paths_in(value[key], (*path, key))]
    return [path, *inner] if path else inner


@st.composite
def spoilt_values(draw: st.DrawFn, valid: Any) -> Any:
    """Draw a structure with one or two values replaced, dropped, or moved to another name."""
    values = copy.deepcopy(valid)
    for _ in range(draw(st.integers(1, 2))):
        *parents, last = draw(st.sampled_from(paths_in(values)))
        holder = values
        for key in parents:
            holder = holder[key]
        match draw(st.sampled_from(["replace", "replace", "replace", "drop", "rename"])):
            case "replace":
                holder[last] = copy.deepcopy(draw(st.sampled_from(ODD_VALUES)))
            case "drop":
                del holder[last]
            case _ if isinstance(holder, dict):
                holder["renamed"] = holder.pop(last)
        if not paths_in(values):
            break
    return values


def spoilt_json(valid: Any) -> st.SearchStrategy[bytes]:
    text = json.dumps(valid, indent=1).encode()
    return spoilt_bytes(text) | spoilt_values(valid).map(lambda values: json.dumps(values).encode())


def spoilt_yaml(valid: Any) -> st.SearchStrategy[bytes]:
    text = yaml.safe_dump(valid).encode()
    return spoilt_bytes(text) | spoilt_values(valid).map(lambda values: yaml.safe_dump(values).encode())
