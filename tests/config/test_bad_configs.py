"""Every field of every config, spoilt in every way its type allows.

Each mistake must give exit code 2 and one line with the file and the key.
"""

import datetime
import inspect
import json
import math
import types
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pytest

from rebeca_ray.config import jobs as config_module
from rebeca_ray.config.fields import Settings, as_typed
from rebeca_ray.config.jobs import GenerateConfig, TrainConfig
from rebeca_ray.config.load import load_config, parse_config
from rebeca_ray.config.presets import PRESETS
from rebeca_ray.config.verifier import VerifierSettings
from rebeca_ray.errors import InputError

JOBS = [
    member
    for _, member in inspect.getmembers(config_module, inspect.isclass)
    if issubclass(member, Settings) and member.__module__ == config_module.__name__
]
SECTIONS_OF_NO_JOB = [VerifierSettings]
HUGE = 10**30
LONG = "x" * 10**6
LONG_KEY = "x" * 90_000  # almost a whole file
NUMBERS = [
    True,
    "1",
    "one",
    "",
    [1],
    {"a": 1},
    HUGE,
    -HUGE,
    math.inf,
    -math.inf,
    math.nan,
    datetime.date(2026, 1, 5),
]
BAD: dict[Any, list[Any]] = {  # values that the type must refuse
    bool: [1, 0, 1.0, "yes", "true", "", [True], {"a": True}, HUGE, LONG],
    int: [*NUMBERS, 1.0, 1.5, LONG],
    float: [*NUMBERS, LONG],
    str: [True, 1.5, math.nan, ["a"], {"a": "b"}, "", "a\0b", "a\nb", "\ud800", LONG],
    datetime.date: [
        True,
        0,
        HUGE,
        1.5,
        "tomorrow",
        "2026-01-05",
        "",
        ["a"],
        {"a": 1},
        LONG,
        datetime.datetime(2026, 1, 5, 1),
    ],
    Literal: ["no such word", "", 7, True, HUGE, math.nan, ["a"], {"a": 1}, "a\0b", LONG],
    tuple: ["12", 7, True, HUGE, {"a": 1}, "", LONG],
}
SECTION = [7, "text", True, ["a"], math.nan, LONG]
Key = tuple[str, ...]


def unwrap(annotation: Any, metadata: list[Any]) -> tuple[Any, list[Any], bool]:
    """Return the type inside `Annotated` and `| None`, all its metadata, and whether it may be null."""
    null = False
    while True:
        if get_origin(annotation) is Annotated:
            annotation, *more = get_args(annotation)
            metadata = [*metadata, *more]
        elif get_origin(annotation) in (Union, types.UnionType):
            (annotation,) = [kind for kind in get_args(annotation) if kind is not type(None)]
            null = True
        else:
            return annotation, metadata, null


def fields_of(model: type[Settings]) -> Iterator[tuple[str, Any, list[Any], bool, bool]]:
    """Yield each field: name, type, metadata, whether it may be null, whether it is required."""
    for name, field in model.model_fields.items():
        yield name, *unwrap(field.annotation, field.metadata), field.is_required()


def is_section(kind: Any) -> bool:
    return inspect.isclass(kind) and issubclass(kind, Settings)


def example(model: type[Settings]) -> dict[str, Any]:
    """Return the required values of a config, with every section opened."""
    values: dict[str, Any] = {}
    for name, kind, _, _, required in fields_of(model):
        if is_section(kind):
            values[name] = example(kind)
        elif required:
            values[name] = {str: "a", float: 1.0, int: 1}[kind]
    return values


def bad_values(kind: Any, metadata: list[Any]) -> Iterator[Any]:
    origin = get_origin(kind) or kind
    yield from BAD[origin]
    if kind is str and not any(getattr(mark, "func", None) is as_typed for mark in metadata):
        yield from (7, HUGE, datetime.date(2026, 1, 5))
    if origin is tuple and get_args(kind)[-1] is Ellipsis:
        yield from ([bad] for bad in [None, *bad_values(*unwrap(get_args(kind)[0], [])[:2])])
    elif origin is tuple:
        good = list(range(len(get_args(kind))))
        yield from ([], good[1:], [*good, 7])
        for index, element in enumerate(get_args(kind)):
            for bad in [None, *bad_values(*unwrap(element, [])[:2])]:
                yield [*good[:index], bad, *good[index + 1 :]]


def mistakes(model: type[Settings], above: Key = (), values: int | None = None) -> Iterator[tuple[Key, Any]]:
    """Yield every key below `model` with every value that it must refuse, or with so many `values`.

    A job inside another job has a test of its own, so here each of its keys gets a single value.
    """
    for name, kind, metadata, null, _ in fields_of(model):
        key = (*above, name)
        if not null:
            yield key, None
        if is_section(kind):
            yield from ((key, bad) for bad in SECTION)
            yield (*key, "no_such_key"), 1
            yield (*key, LONG_KEY), 1
            yield from mistakes(kind, key, 1 if kind in JOBS else values)
        else:
            yield from ((key, bad) for bad in islice(bad_values(kind, metadata), values))
    yield (*above, "no_such_key"), 1


def keys_of(model: type[Settings], above: Key = ()) -> Iterator[tuple[Key, bool]]:
    for name, kind, _, _, required in fields_of(model):
        yield (*above, name), required
        if is_section(kind):
            yield from keys_of(kind, (*above, name))


def changed(values: dict[str, Any], key: Key, value: Any) -> dict[str, Any]:
    first, *rest = key
    return {**values, first: changed(values[first], tuple(rest), value) if rest else value}


def without(values: dict[str, Any], key: Key) -> dict[str, Any]:
    first, *rest = key
    if not rest:
        return {name: value for name, value in values.items() if name != first}
    return {**values, first: without(values[first], tuple(rest))}


def yaml_of(values: Any, twice: Key) -> str:
    """Return one line of YAML with the key `twice` in it twice."""
    if not isinstance(values, dict):
        return json.dumps(values)
    parts = []
    for name, value in values.items():
        rest = twice[1:] if twice[:1] == (name,) else ()
        parts += [f"{json.dumps(name)}: {yaml_of(value, rest)}"] * (2 if twice == (name,) else 1)
    return f"{{{', '.join(parts)}}}"


def assert_one_line(caught: pytest.ExceptionInfo[InputError], beginning: str) -> str:
    message = str(caught.value)
    assert isinstance(caught.value, InputError)
    assert message.startswith(beginning), message[:500]
    assert len(message) < 500
    assert message.splitlines() == [message]
    return message


@pytest.mark.parametrize("model", [*JOBS, *SECTIONS_OF_NO_JOB])
def test_the_example_is_valid_and_null_is_accepted_where_the_type_allows_it(model: type[Settings]) -> None:
    """Otherwise the tests below could pass because of another mistake."""
    values = example(model)
    whole = parse_config(model, values, where="file").model_dump()
    assert parse_config(model, whole, where="file").model_dump() == whole
    for name, kind, _, null, required in fields_of(model):
        if null and not required and not is_section(kind):
            assert getattr(parse_config(model, {**values, name: None}, where="file"), name) is None


@pytest.mark.parametrize("model", [*JOBS, *SECTIONS_OF_NO_JOB])
def test_every_key_refuses_every_bad_value(model: type[Settings]) -> None:
    values = example(model)
    count = 0
    for key, bad in mistakes(model):
        name = ".".join(key)
        with pytest.raises(InputError) as caught:
            parse_config(model, changed(values, key, bad), where="file.yaml")
        unknown = key[-1] in ("no_such_key", LONG_KEY)
        message = assert_one_line(
            caught, f"file.yaml: unknown key '{name[:50]}" if unknown else f"file.yaml: {name}"
        )
        expectation = ("; ", " should ", "field required")
        assert any(word in message for word in expectation), message
        count += 1
    assert count > 10 * len(model.model_fields)


@pytest.mark.parametrize("model", JOBS)
def test_a_missing_key_and_a_repeated_key_are_reported(model: type[Settings], tmp_path: Path) -> None:
    values = parse_config(model, example(model), where="file").model_dump(mode="json")
    file = tmp_path / "file.yaml"
    for key, required in keys_of(model):
        file.write_text(yaml_of(values, key))
        with pytest.raises(InputError) as caught:
            load_config(model, file)
        assert_one_line(
            caught,
            f"config {file}: not valid YAML (key {key[-1]!r} appears twice, keep one in line 1, column ",
        )
        if required:
            name = ".".join(key)
            with pytest.raises(InputError) as caught:
                parse_config(model, without(values, key), where="file.yaml")
            assert_one_line(caught, f"file.yaml: key '{name}' is missing; set it in the file or as {name}=…")


@pytest.mark.parametrize("model", JOBS)
def test_overrides_are_as_strict_as_the_file(model: type[Settings], tmp_path: Path) -> None:
    file = tmp_path / "file.yaml"
    file.write_text(json.dumps(example(model)))
    for key, _ in keys_of(model):
        name = ".".join(key)
        for text, beginning in (
            (f"{name}=[", f"override '{name}=["),
            (f"{name}=[.nan, 1]", f"{file}: {name}"),
        ):
            with pytest.raises(InputError) as caught:
                load_config(model, file, [text])
            assert_one_line(caught, beginning[:60])


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_does_not_replace_a_section_of_another_type(preset: str) -> None:
    for section in PRESETS[preset]:
        for bad in (None, 0, "", []):
            with pytest.raises(InputError) as caught:
                parse_config(
                    TrainConfig, {**example(TrainConfig), "preset": preset, section: bad}, where="file.yaml"
                )
            assert_one_line(
                caught, f"file.yaml: {section} is a section, not the value {bad!r}; set one of its keys ("
            )


LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "key 'prior' is missing"),
        (b"# nothing\n", "key 'prior' is missing"),
        (b"[]", "found list at the top, expected a mapping of settings"),
        (b"0", "found int at the top"),
        (b"false", "found bool at the top"),
        (b"\xff\xfe\xfd", "not valid YAML ('utf-8' codec can't decode"),
        (b"a: \0", "not valid YAML (unacceptable character #x0000"),
        (b"PAR1\x15\x04", "not valid YAML ("),
        (b"a: 1\n---\nb: 2\n", "not valid YAML (but found another document in line 2, column 1)"),
        (b"x" * 10**7, "is longer than 100,000 characters; give a file of settings"),
        (b"[" * 10**5, "not valid YAML (nested too deeply)"),
        (b"a: " + b"{b: " * 30_000, "is longer than 100,000"),
        (b"a: " + b"{b: " * 20_000, "not valid YAML (nested too deeply)"),
        (LAUGHS.encode(), "not valid YAML (found an alias, write the value itself in line 2, column 8)"),
        (b"a: &a [*a]", "not valid YAML (found an alias"),
        (
            b"num_images: 1\nnum_images: 2",
            "not valid YAML (key 'num_images' appears twice, keep one in line 2, column 1)",
        ),
        (
            b"a: !!python/object/apply:os.system [ls]",
            "not valid YAML (could not determine a constructor for the tag",
        ),
        (b"a: !!timestamp x", "not valid YAML ("),
        (b"a: !!int ''", "not valid YAML ("),
        (b"a: !!bool x", "not valid YAML ("),
        (b"a: " + b"9" * 5000, "not valid YAML (Exceeds the limit (4300"),
        (
            b"num_images: !!int 0x" + b"f" * 5000,
            "num_images = a number of thousands of digits: input should be less than or equal to 32767",
        ),
        (b"7: 8", "7 = 7: keys should be strings"),
        (b"null: 8", "keys should be strings"),
        (b"? [a]\n: 8", "not valid YAML (found unhashable key"),
        (b"decoder: !!set {a, b}", "decoder is a section"),
        (b"run_id: 1e5", "run_id = 100000.0: input should be a valid string"),
        (b"num_images: 1_000", "num_images = '1_000': input should be a valid integer"),
    ],
)
def test_a_file_without_a_valid_config_gives_one_line(tmp_path: Path, text: bytes, message: str) -> None:
    file = tmp_path / "file.yaml"
    valid = {**example(GenerateConfig), "decoder": {"model": "a"}}
    whole = message.startswith(("not valid", "found", "is longer", "key 'prior'"))
    lines = [
        f"{name}: {json.dumps(value)}\n".encode()
        for name, value in valid.items()
        if f"{name}:".encode() not in text
    ]
    file.write_bytes(text if whole else b"".join([*lines, text]))
    with pytest.raises(InputError) as caught:
        load_config(GenerateConfig, file)
    full_message = assert_one_line(caught, "")
    assert f"{file}: " in full_message
    assert message in full_message


def test_a_folder_is_no_config(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        load_config(GenerateConfig, tmp_path)
    assert_one_line(
        caught, f"config {tmp_path}: cannot be read (Is a directory); give an existing YAML file to --config"
    )


def test_identifiers_stay_as_typed_and_powers_of_ten_are_numbers(tmp_path: Path) -> None:
    file = tmp_path / "file.yaml"
    values = {**example(TrainConfig), "run_name": "a"}
    file.write_text(json.dumps(values))
    for typed in ("20260105", "0777", "1_000", "2026-01-05", "1.0.0", "yes"):
        assert load_config(TrainConfig, file, [f"run_name={typed}"]).run_name == typed
    assert (
        load_config(TrainConfig, file, ["optimization.learning_rate=1e-4"]).optimization.learning_rate == 1e-4
    )
