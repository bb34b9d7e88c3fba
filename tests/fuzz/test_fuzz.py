"""Whatever a file holds, a reader returns or raises one line for a person, and leaves the folder as it was.

`REBECA_FUZZ=20000 pytest tests/fuzz` spoils so many files at random. By default, they are a thousand, the
same each time.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rebeca_ray.catalog import row_groups
from rebeca_ray.catalog.read import read_catalog
from rebeca_ray.catalog.snapshots import list_snapshots
from rebeca_ray.catalog.verify import verify
from rebeca_ray.catalog.versions import current_version
from rebeca_ray.config.decoder import DecoderSettings
from rebeca_ray.config.jobs import GenerateConfig
from rebeca_ray.config.load import load_config
from rebeca_ray.config.sections import InteractionSettings
from rebeca_ray.data.interactions import read_interactions
from rebeca_ray.decoder.files import identify_decoder
from rebeca_ray.errors import UserError
from rebeca_ray.generation.request import check_request
from rebeca_ray.prior.checkpoint import load_prior
from tests.conftest import USERS, generate_config
from tests.fuzz.mutations import spoilt_bytes, spoilt_json, spoilt_values, spoilt_yaml
from tests.generation.test_nights import night

TARGETS = 10
FILES = int(os.environ.get("REBECA_FUZZ", "1000"))
fuzzed = settings(
    max_examples=FILES // TARGETS,
    derandomize="REBECA_FUZZ" not in os.environ,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_decoder: DecoderSettings) -> GenerateConfig:
    """A published night, and its inputs."""
    config = generate_config(tmp_path_factory.mktemp("fuzz"), tiny_decoder)
    night(config, USERS[:2])
    return config


def names_below(folder: Path) -> list[str]:
    return sorted(str(path) for path in folder.rglob("*"))


def survives(read: Callable[[], Any], folder: Path) -> None:
    """Call a reader. It may raise a UserError of one line alone, and makes and removes no file."""
    before, message = names_below(folder), "read"
    row_groups.footer_bytes.cache_clear()
    try:
        read()
    except UserError as error:
        message = str(error)
    assert len(message.splitlines()) == 1
    assert len(message) < 2000
    assert names_below(folder) == before


@contextmanager
def spoiling(path: Path) -> Iterator[Path]:
    """Let a block spoil a file, and restore it."""
    whole = path.read_bytes()
    try:
        yield path
    finally:
        path.write_bytes(whole)


def valid_table(**columns: Any) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink)
    return bytes(sink.getvalue())


INTERACTIONS = valid_table(
    user_id=[f"u{row % 7}" for row in range(50)],
    item_id=[f"i{row}" for row in range(50)],
    rating=[float(row % 5 + 1) for row in range(50)],
    timestamp=pa.array(range(50), pa.timestamp("us")),
)
REQUEST = valid_table(
    user_id=USERS, num_images=pa.array([1, None, 3, 4, 5, 6, 7], pa.int32()), prompt=["a"] * 7
)
ROWS = (b'u%d,"i,%d",4.5,2026-01-05T10:00:00\n' % (row % 3, row) for row in range(40))
CSV = b"user_id,item_id,rating,timestamp\n" + b"".join(ROWS)


@fuzzed
@given(data=st.data())
def test_config(world: GenerateConfig, data: st.DataObject) -> None:
    folder = Path(world.request).parent
    path = folder / "night.yaml"
    path.write_bytes(data.draw(spoilt_yaml(world.model_dump(mode="json", exclude_none=True))))
    survives(lambda: load_config(GenerateConfig, path), folder)


@fuzzed
@given(data=st.data())
def test_request(world: GenerateConfig, data: st.DataObject) -> None:
    folder = Path(world.request).parent
    path = folder / "spoilt.parquet"
    path.write_bytes(data.draw(spoilt_bytes(REQUEST)))
    decoder = identify_decoder(world.decoder)
    survives(lambda: check_request(world.model_copy(update={"request": str(path)}), decoder), folder)


@fuzzed
@given(content=spoilt_bytes(INTERACTIONS))
def test_interactions(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "interactions" / "a.parquet"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    survives(lambda: read_interactions(InteractionSettings(path=str(path), min_likes=1)), path.parent)


@fuzzed
@given(content=spoilt_bytes(CSV))
def test_interactions_as_csv(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "ratings" / "a.csv"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    survives(lambda: read_interactions(InteractionSettings(path=str(path), min_likes=1)), path.parent)


def read_everything(root: str) -> None:
    list_snapshots(root)
    snapshot = read_catalog(root)
    snapshot.for_user(USERS[0])
    snapshot.items()


@fuzzed
@given(data=st.data())
def test_pointer(world: GenerateConfig, data: st.DataObject) -> None:
    with spoiling(Path(world.catalog, "latest.json")) as path:
        path.write_bytes(data.draw(spoilt_json(json.loads(path.read_bytes()))))
        survives(lambda: read_everything(world.catalog), Path(world.catalog))


@fuzzed
@given(data=st.data())
def test_manifest(world: GenerateConfig, data: st.DataObject) -> None:
    with spoiling(Path(world.catalog, read_catalog(world.catalog).path, "manifest.json")) as path:
        path.write_bytes(data.draw(spoilt_json(json.loads(path.read_bytes()))))
        survives(lambda: read_everything(world.catalog), Path(world.catalog))


def with_list(root: str, content: bytes) -> None:
    """Read a catalog with another file list, whose checksum is in the manifest."""
    snapshot = read_catalog(root)
    with (
        spoiling(Path(root, snapshot.manifest.files.path)) as path,
        spoiling(Path(root, snapshot.path, "manifest.json")) as manifest,
    ):
        path.write_bytes(content)
        values = json.loads(manifest.read_bytes())
        values["files"]["sha256"] = hashlib.sha256(content).hexdigest()
        manifest.write_text(json.dumps(values))
        survives(lambda: read_everything(root), Path(root))


@fuzzed
@given(data=st.data())
def test_bytes_of_the_file_list(world: GenerateConfig, data: st.DataObject) -> None:
    snapshot = read_catalog(world.catalog)
    whole = Path(world.catalog, snapshot.manifest.files.path).read_bytes()
    with_list(world.catalog, data.draw(spoilt_bytes(whole)))


@fuzzed
@given(data=st.data())
def test_values_of_the_file_list(world: GenerateConfig, data: st.DataObject) -> None:
    """Each column may have another type, or be missing."""
    files = read_catalog(world.catalog).files
    columns = data.draw(spoilt_values(files.to_pydict()))
    arrays = {}
    for name, values in columns.items():
        with suppress(pa.ArrowException, OverflowError, TypeError, UnicodeEncodeError):
            array = pa.array(values)
            arrays[name] = array.cast(files.schema.field(name).type) if name in files.schema.names else array
    rows = min(map(len, arrays.values()), default=0)
    with_list(world.catalog, valid_table(**{name: array[:rows] for name, array in arrays.items()}))


@fuzzed
@given(data=st.data())
def test_items_of_a_snapshot(world: GenerateConfig, data: st.DataObject) -> None:
    snapshot = read_catalog(world.catalog)
    with spoiling(Path(world.catalog, snapshot.paths("items")[0])) as path:
        path.write_bytes(data.draw(spoilt_bytes(path.read_bytes())))
        survives(lambda: read_everything(world.catalog), Path(world.catalog))
        survives(lambda: verify(read_catalog(world.catalog), "full"), Path(world.catalog))


@fuzzed
@given(data=st.data())
def test_config_of_a_prior(world: GenerateConfig, data: st.DataObject) -> None:
    with spoiling(Path(current_version(world.prior, "prior"), "config.json")) as path:
        path.write_bytes(data.draw(spoilt_json(json.loads(path.read_bytes()))))
        decoder = identify_decoder(world.decoder)
        survives(lambda: check_request(world, decoder), Path(world.prior))
        survives(lambda: load_prior(world.prior), Path(world.prior))
