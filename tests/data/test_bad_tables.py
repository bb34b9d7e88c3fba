"""Spoil every column of every input table in every way of its type.

Each error is one line that names table, column and remedy, and the job writes nothing.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.local import LocalFileSystem

from rebeca_ray import schemas
from rebeca_ray.config.decoder import DecoderSettings
from rebeca_ray.config.jobs import EmbedConfig, GenerateConfig
from rebeca_ray.config.sections import InteractionSettings
from rebeca_ray.data import histories as histories_module
from rebeca_ray.data.embedding import embed_items
from rebeca_ray.data.histories import build_histories
from rebeca_ray.data.interactions import read_interactions
from rebeca_ray.data.items import read_image_embeds
from rebeca_ray.decoder.files import DecoderIdentity, identify_decoder
from rebeca_ray.errors import InputError, UserError
from rebeca_ray.generation.pipeline import generate_catalog
from rebeca_ray.generation.request import check_request
from rebeca_ray.storage.parquet import read_table
from tests.conftest import D, generate_config
from tests.data.pictures import LONG, picture

ROWS = 3
IDS = np.array([f"item_id-{row}" for row in range(ROWS)])
NUMBERS = (pa.float64(), pa.float16(), pa.int64(), pa.int8(), pa.uint64())
TOGETHER = {"item_id", "strength"}  # of a request: `tests/generation/test_variants.py` spoils one of them
EVERY_TYPE = [  # one column each
    pa.array([0.5] * ROWS),
    pa.array([1] * ROWS),
    pa.array([True] * ROWS),
    pa.array([b"a"] * ROWS),
    pa.array(["2026-01-05"] * ROWS),
    pa.array(["1"] * ROWS).dictionary_encode(),
    pa.array([["a"]] * ROWS),
    pa.array([[1.0]] * ROWS),
    pa.array([[1.0] * D] * ROWS, pa.list_(pa.float32(), D)),
    pa.array([{"path": "a"}] * ROWS),
    pa.array([{"bytes": "a"}] * ROWS),
    pa.array([{"bytes": b"a"}] * ROWS),
    pa.array([0] * ROWS, pa.timestamp("us")),
    pa.array([0] * ROWS, pa.date32()),
    pa.array([0] * ROWS, pa.duration("s")),
    pa.nulls(ROWS),
]


@dataclass(frozen=True)
class Input:
    """An input table of a job: its name in errors, the columns that identify its rows, and its reader."""

    what: str
    schema: pa.Schema
    known_by: list[str]
    read: Callable[[str], Any]
    writes_nothing: Path
    good: Callable[[str], Any] | None = (
        None  # reads a good table, where `read` would go on to work for minutes
    )


@pytest.fixture(scope="module")
def world(
    tmp_path_factory: pytest.TempPathFactory, tiny_decoder: DecoderSettings
) -> tuple[GenerateConfig, DecoderIdentity]:
    return generate_config(tmp_path_factory.mktemp("world"), tiny_decoder), identify_decoder(tiny_decoder)


@pytest.fixture(params=["interactions", "items", "embedded items", "real items", "request"])
def table(
    request: pytest.FixtureRequest, world: tuple[GenerateConfig, DecoderIdentity], tmp_path: Path
) -> Input:
    config, decoder = world
    out = tmp_path / "out"
    config = config.model_copy(update={"catalog": str(out)})
    known = tmp_path / "known.parquet"  # the items that a request may name
    pq.write_table(good_table(schemas.embedded_items(D)), known)

    def history(path: str) -> Any:
        return build_histories(InteractionSettings(path=path), IDS, str(out / "storage"))

    def alone(path: str) -> Any:
        return read_interactions(InteractionSettings(path=path))

    def embed(path: str) -> Any:
        return embed_items(EmbedConfig(items=path, clip="local-dir:/no/such/clip", out=str(out)))

    def generate(key: str) -> Callable[[str], Any]:
        return lambda path: check_request(config.model_copy(update={key: path}), decoder)

    def request_of(path: str) -> Any:
        return check_request(config.model_copy(update={"request": path, "items": str(known)}), decoder)

    return {
        "interactions": Input(
            "interactions", schemas.INTERACTIONS, ["user_id", "item_id"], history, out, alone
        ),
        "items": Input(
            "items", schemas.ITEMS, ["item_id"], embed, out, lambda path: read_table(path, "items")
        ),
        "embedded items": Input("items", schemas.embedded_items(D), ["item_id"], read_image_embeds, out),
        "real items": Input("items", schemas.embedded_items(D), ["item_id"], generate("items"), out),
        "request": Input("request", schemas.REQUEST, ["user_id"], request_of, out),
    }[request.param]


def good_column(field: pa.Field) -> pa.Array:
    """Return values that no check refuses."""
    kind = field.type
    if field.name == "event":
        return pa.array(["rating"] * ROWS, kind)
    if pa.types.is_string(kind):
        return pa.array([f"{field.name}-{row}" for row in range(ROWS)], kind)
    if pa.types.is_struct(kind):
        return pa.array([{"bytes": picture(), "path": None}] * ROWS, kind)
    if pa.types.is_fixed_size_list(kind):
        return pa.array([[1.0] * kind.list_size] * ROWS, pa.list_(pa.float32(), kind.list_size))
    return pa.array([1 if field.name == "strength" else 4] * ROWS, pa.int64()).cast(kind)


def good_table(schema: pa.Schema) -> pa.Table:
    return pa.table({field.name: good_column(field) for field in schema})


def with_column(table: pa.Table, name: str, values: pa.Array) -> pa.Table:
    return table.set_column(table.column_names.index(name), name, values)


def first(value: Any, good: pa.Array, kind: pa.DataType | None = None) -> pa.Array:
    """Return the good column with another value in its second row."""
    values = good.to_pylist()
    values[1] = value
    return pa.array(values, kind or good.type)


def is_of(kind: pa.DataType, expected: pa.DataType) -> bool:
    """Tell whether a column of `kind` may stand for `expected`, independently of `columns.stands_for`."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if pa.types.is_string(expected):
        return bool(kind == pa.string())
    if pa.types.is_struct(expected):
        return bool(kind == pa.struct([("bytes", pa.binary())]))
    if pa.types.is_fixed_size_list(expected):
        return str(kind) in (
            "list<element: double>",
            "list<item: double>",
            f"fixed_size_list<item: float>[{D}]",
        )
    numeric = {
        pa.float64(): pa.types.is_floating(expected),
        pa.int64(): pa.types.is_floating(expected) or pa.types.is_integer(expected),
    }
    if pa.types.is_timestamp(expected):
        return kind in (pa.timestamp("us"), pa.date32(), pa.int64())
    return bool(numeric.get(kind, False))


def bad_columns(field: pa.Field) -> Iterator[pa.Array]:
    """Yield the column spoilt in every way of its type."""
    good, kind = good_column(field), field.type
    for column in EVERY_TYPE:
        if not is_of(column.type, kind) and not (field.nullable and column.type == pa.null()):
            yield column
    if not field.nullable:
        yield first(None, good)
        yield pa.nulls(ROWS, good.type)
    if pa.types.is_string(kind):
        yield first(LONG, good)
        yield pa.array([b"\xff\xfe"] * ROWS).view(pa.string())  # not UTF-8
        if not field.nullable:
            yield from (first(bad, good) for bad in ("", "a\0b", "a\nb", "a\x1fb"))
            yield first("", good).dictionary_encode()
            yield first("", good, pa.large_string())
    elif pa.types.is_integer(kind):
        yield from (first(bad, good, pa.int64()) for bad in (0, -1, 2**31, 2**63 - 1, -(2**63)))
        yield first(2**64 - 1, good, pa.uint64())
        yield first(-(2**31), good, pa.int32())
    elif pa.types.is_floating(kind):
        yield from (
            first(bad, good, pa.float64()) for bad in (np.nan, np.inf, -np.inf, 1e300, -1e300, 3.4e38)
        )
        yield from (pa.array([4, bad, 4], pa.int64()) for bad in (2**63 - 1, -(2**63), 2**24 + 1))
        yield pa.array([4, 2**64 - 1, 4], pa.uint64())
    elif pa.types.is_timestamp(kind):
        units = [pa.timestamp("ms"), pa.timestamp("us"), pa.timestamp("us", tz="UTC")]
        yield from (pa.array([0, bad, 0], unit) for unit in units for bad in (2**63 - 1, -(2**63) + 1, 2**58))
        yield pa.array([0, 2**31 - 1, 0], pa.int32()).cast(pa.date32())
    elif pa.types.is_fixed_size_list(kind):
        for bad in (0.0, np.nan, np.inf, 3.4e38):
            yield first([bad] * kind.list_size, good)
        lists = pa.list_(pa.float32())
        yield from (first(bad, good, lists) for bad in ([1.0], [], [None] * kind.list_size, None))
        yield pa.array([None, *good.to_pylist()[1:]], lists)
        yield pa.array([[]] * ROWS, lists)


def assert_refused(table: Input, path: Path, *words: str) -> None:
    with pytest.raises(InputError) as caught:
        table.read(str(path))
    message = str(caught.value)
    assert message.startswith(f"{table.what} {path}: "), message[:300]
    for word in words:
        assert word in message, message[:300]
    assert message.splitlines() == [message]
    assert len(message) < 400 + len(str(path))
    assert "; " in message, message  # the remedy
    assert not table.writes_nothing.exists(), list(table.writes_nothing.rglob("*"))


def test_good_tables_are_read_also_without_optional_columns(table: Input, tmp_path: Path) -> None:
    """Without this, the tests below could pass because of another defect."""
    path, right = tmp_path / "table.parquet", good_table(table.schema)
    for name in (None, *(field.name for field in table.schema if schemas.may_be_missing(field))):
        without = TOGETHER if name in TOGETHER else {name} - {None}
        pq.write_table(right.drop_columns(sorted(without)), path)
        (table.good or table.read)(str(path))
    for field in table.schema:
        if field.nullable and field.name not in TOGETHER:
            good = good_column(field)
            columns = [
                first(None, good),
                pa.nulls(ROWS, field.type),
                *([first("", good)] if pa.types.is_string(field.type) else []),
            ]
            for column in columns:
                pq.write_table(with_column(right, field.name, column), path)
                (table.good or table.read)(str(path))


def test_every_spoilt_column_is_refused(table: Input, tmp_path: Path) -> None:
    path, right = tmp_path / "table.parquet", good_table(table.schema)
    count = 0
    for field in table.schema:
        for column in bad_columns(field):
            if column.type == schemas.IMAGE:
                continue  # the actor that embeds an image checks it: see below
            pq.write_table(with_column(right, field.name, column), path)
            assert_refused(table, path, field.name)
            count += 1
        if not schemas.may_be_missing(field):
            pq.write_table(
                right.drop_columns([field.name]).append_column("another", pa.array([1] * ROWS)), path
            )
            assert_refused(table, path, f"column {field.name!r} is missing; ")
            count += 1
        pq.write_table(
            pa.Table.from_arrays([*right.columns, right[field.name]], [*right.column_names, field.name]), path
        )
        assert_refused(table, path, f"has column {field.name!r} more than once")
    assert count > 12 * len(table.schema)


def test_rows_of_one_name_are_refused(table: Input, tmp_path: Path) -> None:
    path, right = tmp_path / "table.parquet", good_table(table.schema)
    for name in table.known_by:
        right = with_column(right, name, first(right[name][0].as_py(), good_column(table.schema.field(name))))
    pq.write_table(right, path)
    assert_refused(
        table, path, *table.known_by, "keep one" if table.what != "request" else "ask for each user once"
    )


def test_files_that_are_no_tables_are_refused(
    table: Input, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, right = tmp_path / "table.parquet", good_table(table.schema)
    pq.write_table(right.slice(0, 0), path)
    assert_refused(table, path, "has no rows")
    pq.write_table(right, path)
    whole = path.read_bytes()
    broken = [
        b"",
        b"text",
        b"PAR1PAR1",
        whole[:-1],
        whole[: len(whole) // 2],
        whole[:8],
        whole[:-8] + b"\xff\xff\xff\x7fPAR1",
        whole[:-400] + bytes(392) + whole[-8:],
    ]
    for data in broken:
        path.write_bytes(data)
        assert_refused(table, path, "table.parquet is not a readable Parquet file; write it again")
    for again in (right, in_lists(right)):
        pq.write_table(again, path)
        path.write_bytes(whole[:4] + b"\xff" * 60 + path.read_bytes()[64:])
        assert_refused(table, path, "not readable as Parquet (", "; write it again")
    assert_refused(table, path / "below", "not found; give a Parquet ")
    assert_refused(table, tmp_path / "nothing", "not found")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes.txt").write_text("nothing")
    assert_refused(table, tmp_path / "folder", " file (notes.txt); give a Parquet ")

    whole_open = LocalFileSystem.open

    def refuse(self: LocalFileSystem, name: str, *rest: Any, **options: Any) -> Any:
        if name == str(path):
            raise PermissionError(13, "Permission denied")
        return whole_open(self, name, *rest, **options)

    path.write_bytes(whole)
    monkeypatch.setattr(LocalFileSystem, "open", refuse)
    assert_refused(table, path, "cannot be read (Permission denied); check the path and the credentials")


def in_lists(table: pa.Table) -> pa.Table:
    """Return the table with its embeddings in lists of any size, as other writers store them."""
    if "image_embeds" not in table.column_names:
        return table
    return with_column(table, "image_embeds", table["image_embeds"].cast(pa.list_(pa.float32())))


def test_embeddings_may_be_lists(world: tuple[GenerateConfig, DecoderIdentity], tmp_path: Path) -> None:
    pq.write_table(in_lists(good_table(schemas.embedded_items(D))), tmp_path / "items.parquet")
    config, decoder = world
    assert check_request(config.model_copy(update={"items": str(tmp_path / "items.parquet")}), decoder) == 16
    assert read_image_embeds(str(tmp_path / "items.parquet")).image_embeds.shape == (ROWS, D)


def test_counts_in_small_numbers_are_added_up(
    world: tuple[GenerateConfig, DecoderIdentity], tmp_path: Path
) -> None:
    """The default need not fit the column's type."""
    config, decoder = world
    for counts in (
        pa.array([100, None, 100], pa.int8()),
        pa.array([100, None, 100], pa.uint64()),
        pa.array([100, None, 100]).dictionary_encode(),
    ):
        request = tmp_path / "request.parquet"
        pq.write_table(pa.table({"user_id": ["a", "b", "c"], "num_images": counts}), request)
        changed = config.model_copy(update={"request": str(request), "num_images": 1000})
        assert check_request(changed, decoder) == 1200


@pytest.mark.usefixtures("ray_local")
@pytest.mark.parametrize("name", ["user_id", "item_id", "rating"])
def test_a_defect_seen_while_planning_leaves_nothing(
    world: tuple[GenerateConfig, DecoderIdentity], tmp_path: Path, name: str
) -> None:
    right = good_table(schemas.INTERACTIONS)
    pq.write_table(
        with_column(right, name, first(None, good_column(schemas.INTERACTIONS.field(name)))),
        tmp_path / "bad.parquet",
    )
    rated = InteractionSettings(path=str(tmp_path / "bad.parquet"))
    with pytest.raises(UserError, match=rf"^interactions {tmp_path}/bad.parquet: 1 of 3 rows have .*{name}"):
        generate_catalog(
            world[0].model_copy(update={"interactions": rated, "catalog": str(tmp_path / "out")})
        )
    assert not (tmp_path / "out").exists()


def test_files_of_a_folder_that_differ_are_refused(table: Input, tmp_path: Path) -> None:
    folder, right = tmp_path / "folder", good_table(table.schema)
    folder.mkdir()
    pq.write_table(right, folder / "a.parquet")
    for field in table.schema:
        pq.write_table(right.drop_columns([field.name]), folder / "b.parquet")
        assert_refused(
            table,
            folder,
            f"b.parquet and a.parquet differ in their columns ({field.name}); write all files with the same",
        )
        pq.write_table(with_column(right, field.name, pa.array([True] * ROWS)), folder / "b.parquet")
        assert_refused(table, folder, f"column {field.name!r} is bool in b.parquet, expected ")
    (folder / "b.parquet").write_bytes(b"")
    assert_refused(table, folder, "b.parquet is not a readable Parquet file")


@pytest.mark.usefixtures("ray_local")
def test_many_interactions_are_checked_alike_and_leave_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many interactions are first split into buckets."""
    monkeypatch.setattr(histories_module, "ROWS_PER_BUCKET", 2)
    path, right = tmp_path / "table.parquet", good_table(schemas.INTERACTIONS)
    pq.write_table(right.select(["user_id", "item_id"]), path)
    settings = InteractionSettings(path=str(path))
    assert build_histories(settings, IDS, str(tmp_path / "right")).num_users == ROWS
    for name, bad in (
        ("timestamp", pa.array([0, 2**62, 0], pa.timestamp("ms"))),
        ("user_id", first(None, good_column(schemas.INTERACTIONS.field("user_id")))),
    ):
        pq.write_table(with_column(right, name, bad), path)
        with pytest.raises(UserError) as caught:
            build_histories(settings, IDS, str(tmp_path / "out"))
        assert name in str(caught.value)
        assert not list((tmp_path / "out").iterdir())
