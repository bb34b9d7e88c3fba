"""The verbs on every store: a disk, a real S3 server, gcsfs on a fake server, adlfs on Azurite."""

import sys
import threading
from uuid import uuid4

import fsspec
import pyarrow as pa
import pyarrow.dataset
import pytest
from fsspec.registry import _registry
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rebeca_ray.catalog.pointer import Pointer, change_pointer, read_pointer
from rebeca_ray.config.fields import absolute
from rebeca_ray.errors import Failure, InputError, StorageError
from rebeca_ray.storage.filesystem import delete, delete_files, exists, list_files, list_folders
from rebeca_ray.storage.objects import read_json, write_json
from rebeca_ray.storage.parquet import open_parquet, read_table, write_table
from rebeca_ray.storage.remote import check_endpoint
from rebeca_ray.storage.store import STORES, classify, normalize, open_store
from rebeca_ray.storage.writable import require_own, require_writable
from tests.storage.fake_gcs import FakeGcs

TABLE = pa.table({"user_id": [f"user-{row}" for row in range(500)], "rank": list(range(500))})
RACERS = 6
STEPS = 4


def test_a_swap_needs_the_current_version(root: str) -> None:
    store = open_store(f"{root}/object")
    assert store.read_versioned() is None
    assert store.compare_and_swap(b"one", None)
    data, first = store.read_versioned() or (b"", "")
    assert data == b"one"
    assert not store.compare_and_swap(b"two", None)
    assert store.compare_and_swap(b"two", first)
    assert not store.compare_and_swap(b"three", first)
    assert open_store(f"{root}/object").read_versioned() == store.read_versioned()
    assert (store.read_versioned() or (b"",))[0] == b"two"


def test_a_removed_object_has_no_version(root: str) -> None:
    store = open_store(f"{root}/object")
    assert store.compare_and_swap(b"one", None)
    _, version = store.read_versioned() or (b"", "")
    delete(f"{root}/object")
    assert store.read_versioned() is None
    assert not store.compare_and_swap(b"two", version)
    assert store.compare_and_swap(b"three", None)


def test_a_folder_whose_files_are_removed_is_free_again(root: str) -> None:
    """Some stores go on listing the folders of removed objects."""
    write_json({"name": "other"}, f"{root}/out/inner/a.json")
    with pytest.raises(InputError, match="holds something else"):
        require_own(f"{root}/out", "out", {"marker.json": "key"})
    delete(f"{root}/out/inner/a.json")
    require_own(f"{root}/out", "out", {"marker.json": "key"})


@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], database=None
)
@given(st.lists(st.sampled_from(["current", "stale", "none", "put"]), min_size=1, max_size=8))
def test_swaps_follow_the_model(root: str, plan: list[str]) -> None:
    """Content changes if and only if the given version is the current one."""
    uri = f"{root}/{uuid4().hex}"
    store = open_store(uri)
    content: bytes | None = None
    stale: str | None = None
    for step, kind in enumerate(plan):
        data = f"content {step}".encode()
        versioned = store.read_versioned()
        assert (versioned and versioned[0]) == content
        current = versioned[1] if versioned else None
        version = {"current": current, "stale": stale}.get(kind)
        if kind == "put":
            store.put(data)
            content = data
        elif store.compare_and_swap(data, version):
            assert version == current
            content = data
        else:
            assert version != current
        stale = current


def test_no_swap_of_a_race_is_lost(root: str) -> None:
    """Every racer adds STEPS to a counter, by compare-and-swap alone."""
    uri = f"{root}/counter"
    assert open_store(uri).compare_and_swap(b"0", None)
    start = threading.Barrier(RACERS)

    def count() -> None:
        store = open_store(uri)
        start.wait()
        done = 0
        while done < STEPS:
            data, version = store.read_versioned() or (b"", "")
            done += store.compare_and_swap(str(int(data) + 1).encode(), version)

    threads = [threading.Thread(target=count) for _ in range(RACERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (open_store(uri).read_versioned() or (b"",))[0] == str(RACERS * STEPS).encode()


def test_one_racer_creates_the_object(root: str) -> None:
    start = threading.Barrier(RACERS)
    winners: list[int] = []

    def create(racer: int) -> None:
        store = open_store(f"{root}/first")
        start.wait()
        if store.compare_and_swap(str(racer).encode(), None):
            winners.append(racer)

    threads = [threading.Thread(target=create, args=(racer,)) for racer in range(RACERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(winners) == 1
    assert (open_store(f"{root}/first").read_versioned() or (b"",))[0] == str(winners[0]).encode()


def test_a_catalog_pointer_works_on_every_store(root: str) -> None:
    assert read_pointer(root) == (Pointer(), None)
    for epoch in (1, 2, 3):
        assert change_pointer(root, lambda _, epoch=epoch: Pointer(fencing_token=epoch)) == Pointer(
            fencing_token=epoch
        )
    assert read_pointer(root)[0] == Pointer(fencing_token=3)


def test_files_tables_and_folders(root: str) -> None:
    require_writable(root, "out")
    record = write_table(TABLE, f"{root}/items/a.parquet", row_group_size=100)
    assert record["rows"] == 500
    assert read_table(f"{root}/items", "items").equals(TABLE)
    assert len(open_parquet(f"{root}/items", "items").digest()) == 32
    write_json({"a": 1}, f"{root}/one.json")
    write_json({"a": 2}, f"{root}/one.json")
    assert read_json(f"{root}/one.json") == {"a": 2}
    assert read_json(f"{root}/none.json") is None
    assert list_files(root) == [f"{root}/items/a.parquet", f"{root}/one.json"]
    assert list_folders(root) == ["items"]
    assert exists(f"{root}/one.json")
    delete_files([f"{root}/one.json"])
    delete_files([f"{root}/one.json"])
    assert not exists(f"{root}/one.json")
    delete(f"{root}/items")
    delete(f"{root}/items")
    assert list_files(root, ".parquet") == list_files(root, ".json") == []


def test_scans_read_the_tables(root: str) -> None:
    for part in range(2):
        table = TABLE.slice(250 * part, 250)
        write_table(table, f"{root}/{part}.parquet", row_group_size=100)
    store = open_store(root)
    files = [f"{store.path}/{part}.parquet" for part in range(2)]
    dataset = pyarrow.dataset.dataset(files, filesystem=store.scan_filesystem(), format="parquet")
    assert dataset.to_table().equals(TABLE)
    with pytest.raises((OSError, pa.ArrowException)) as caught:
        pyarrow.dataset.dataset(
            [f"{store.path}/9.parquet"],
            filesystem=store.scan_filesystem(),
            format="parquet",
            schema=TABLE.schema,
        ).to_table()
    assert classify(caught.value) is Failure.MISSING


def test_headers_are_kept_for_web_servers(gcs: str, gcs_server: FakeGcs) -> None:
    open_store(f"{gcs}/a.png").put(b"x", content_type="image/png", cache_control="public")
    blob = gcs_server.blobs[f"{gcs}/a.png".removeprefix("gs://")]
    assert (blob.data, blob.content_type, blob.cache_control) == (b"x", "image/png", "public")


def test_headers_are_kept_on_azure(azure: str) -> None:
    store = open_store(f"{azure}/a.png")
    store.put(b"x", content_type="image/png", cache_control="public")
    kept = store.filesystem.info(store.path)["content_settings"]
    assert (kept["content_type"], kept["cache_control"]) == ("image/png", "public")


def test_a_lost_answer_is_no_lost_race(gcs: str, gcs_server: FakeGcs) -> None:
    """The write is stored, the answer is 503, and the client's second try is refused by 412."""
    for epoch in (1, 2):
        gcs_server.lose_answers = 1
        assert change_pointer(gcs, lambda _, epoch=epoch: Pointer(fencing_token=epoch)) == Pointer(
            fencing_token=epoch
        )
        assert gcs_server.lose_answers == 0
    assert read_pointer(gcs)[0] == Pointer(fencing_token=2)


def test_a_forbidden_object_ends_in_one_line(
    gcs: str, gcs_server: FakeGcs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gcs_server, "forbidden", gcs.removeprefix("gs://"))
    write_json({"a": 1}, f"{gcs}/a.json")
    with pytest.raises(InputError, match=r"^gs://.*/a.json: cannot be read \(Forbidden: .*check the path"):
        read_json(f"{gcs}/a.json")


@pytest.mark.parametrize(("uri", "extra"), [("gs://bucket/a", "gcs"), ("abfss://box@name/a", "azure")])
def test_a_store_without_its_client_names_the_extra(
    uri: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, {"gcs": "gcsfs", "azure": "adlfs"}[extra], None)
    for protocol in ("gs", "gcs", "abfss"):
        monkeypatch.delitem(_registry, protocol, raising=False)
    with pytest.raises(
        InputError, match=rf"^{uri}: .* is not installed; .*pip install 'rebeca-ray\[{extra}\]'"
    ):
        open_store(uri)


@pytest.mark.parametrize(
    ("variable", "value", "uri"),
    [
        ("STORAGE_EMULATOR_HOST", "http://127.0.0.1:9", "gs://bucket/a"),
        (
            "AZURE_STORAGE_CONNECTION_STRING",
            "BlobEndpoint=http://127.0.0.1:9/a;AccountKey=YQ==",
            "abfss://box/a",
        ),
    ],
)
def test_an_unreachable_server_fails_fast(
    variable: str, value: str, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gcsfs" if uri.startswith("gs") else "adlfs")
    monkeypatch.setenv(variable, value)
    monkeypatch.setattr(fsspec.get_filesystem_class(uri.partition(":")[0]), "_cache", {})
    check_endpoint.cache_clear()
    with pytest.raises(StorageError, match=rf"^{uri}: its server cannot be reached \(.*refused.*127.0.0.1:9"):
        open_store(uri)


def test_an_account_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("adlfs")
    for name in ("AZURE_STORAGE_CONNECTION_STRING", "AZURE_STORAGE_ACCOUNT_NAME"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(InputError, match=r"^abfss://box/a: its client cannot be opened \(.*; give abfss://"):
        open_store("abfss://box/a")


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("s3a://bucket/a", "s3://bucket/a"),
        ("s3://bucket/a", "s3://bucket/a"),
        ("gcs://bucket/a", "gs://bucket/a"),
        ("abfs://box@name/a", "abfss://box@name/a"),
        ("file:///data/a", "/data/a"),
        ("/data/a", "/data/a"),
        ("ftp://host/a", "ftp://host/a"),
    ],
)
def test_every_location_has_one_spelling(uri: str, expected: str) -> None:
    assert normalize(uri) == expected
    assert absolute(uri) == expected


@pytest.mark.parametrize(
    ("uri", "why"),
    [
        ("s3:/bucket/a", "is no address; give s3://bucket/prefix"),
        ("gs:bucket", "is no address; give gs://bucket/prefix"),
        ("file://host/a", "has a host or a relative path; give file:///absolute/path"),
        ("ftp://host/a", "storage 'ftp' is not supported; give a local path or s3://bucket/prefix or gs://"),
        ("gs://", "names no bucket; give gs://bucket/prefix"),
    ],
)
def test_a_malformed_location_is_refused(uri: str, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if uri == "gs://":
        pytest.importorskip("gcsfs")
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://127.0.0.1:9")
    with pytest.raises(InputError, match=rf"^{uri}: {why}"):
        open_store(uri)


def test_failures_have_the_same_names_on_every_store() -> None:
    from botocore.exceptions import NoCredentialsError

    expected = [
        (FileNotFoundError(2, "a"), Failure.MISSING),
        (NotADirectoryError(20, "a"), Failure.MISSING),
        (PermissionError("a"), Failure.DENIED),
        (OSError(28, "a"), Failure.FULL),
        (OSError(5, "a"), Failure.FAILED),
        (OSError("Corrupt footer"), Failure.DAMAGED),
        (pa.ArrowInvalid("a"), Failure.DAMAGED),
        (OSError("AWS Error NO_SUCH_KEY during GetObject"), Failure.MISSING),
        (OSError("AWS Error SLOW_DOWN during GetObject"), Failure.FAILED),
        (OSError("AWS Error UNKNOWN (HTTP status 416) during GetObject"), Failure.DAMAGED),
        (NoCredentialsError(), Failure.DENIED),
        (OSError(121, "a"), Failure.UNREACHABLE),
        (ConnectionResetError("a"), Failure.UNREACHABLE),
        (StorageError("a"), None),
        (KeyError("a"), None),
    ]
    assert [classify(error) for error, _ in expected] == [failure for _, failure in expected]


def test_failures_of_the_optional_clients() -> None:
    retry = pytest.importorskip("gcsfs.retry")
    azure = pytest.importorskip("azure.core.exceptions")
    assert classify(retry.HttpError({"code": 401, "message": "who?"})) is Failure.DENIED
    assert classify(retry.HttpError({"code": 503, "message": "busy"})) is Failure.UNREACHABLE
    assert classify(OSError("Forbidden: b/bucket/o\nno")) is Failure.DENIED
    assert classify(azure.ResourceNotFoundError("a")) is Failure.UNREACHABLE  # without an answer
    assert classify(azure.ServiceRequestError("a")) is Failure.UNREACHABLE


def test_the_local_store_is_asked_last() -> None:
    assert STORES[-1].schemes[0] == "file"
