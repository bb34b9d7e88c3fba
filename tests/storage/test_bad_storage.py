"""Unusable storage, local and on a real S3 server: one line and exit code, in seconds, no file left."""

import errno
import http.server
import json
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import fsspec
import pyarrow as pa
import pytest
from fsspec.implementations.local import LocalFileOpener, LocalFileSystem
from ray.exceptions import RayTaskError
from s3fs import S3FileSystem

from rebeca_ray import schemas
from rebeca_ray.catalog.pointer import Pointer, change_pointer, read_pointer
from rebeca_ray.catalog.read import read_catalog
from rebeca_ray.cli.runner import plain_errors
from rebeca_ray.data.items import read_image_embeds
from rebeca_ray.data.validation import check_columns
from rebeca_ray.errors import InputError, StorageError
from rebeca_ray.prior.checkpoint import read_prior_config
from rebeca_ray.storage import remote
from rebeca_ray.storage import s3 as s3_module
from rebeca_ray.storage.filesystem import (
    delete,
    delete_files,
    exists,
    list_files,
    list_folders,
    open_filesystem,
)
from rebeca_ray.storage.gcs import GcsStore
from rebeca_ray.storage.objects import read_json, write_json
from rebeca_ray.storage.parquet import open_parquet, read_table, write_table
from rebeca_ray.storage.s3 import S3Store
from rebeca_ray.storage.writable import require_own, require_writable

TABLE = pa.table({"user_id": ["a"], "item_id": ["b"]})
NEEDED: list[Callable[[str], Any]] = [  # what reads something that must be there
    lambda uri: open_parquet(uri, "the table"),
    lambda uri: read_table(uri, "the table"),
    lambda uri: check_columns(open_parquet(uri, "the table"), schemas.INTERACTIONS),
    lambda uri: read_image_embeds(uri),
    lambda uri: read_prior_config(uri),
    lambda uri: read_catalog(uri),
]
READERS: list[Callable[[str], Any]] = [
    *NEEDED,
    lambda uri: read_pointer(uri),
    lambda uri: read_json(f"{uri}/a.json"),
]
WRITERS: list[Callable[[str], Any]] = [
    lambda uri: require_own(uri, "out", {"items.json": "fencing_token", "embedding.json": "clip"}),
    lambda uri: require_writable(uri, "out"),
]


@pytest.fixture
def s3(s3_server: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Set up the S3 server by the environment alone, with no client of another test.

    Yields the monkeypatch that changes the environment.
    """
    for name, value in s3_server.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(S3FileSystem, "_cache", {})
    s3_module.check_reachable.cache_clear()
    yield monkeypatch
    s3_module.check_reachable.cache_clear()


def assert_one_line(
    work: Callable[[str], Any], uri: str, words: str, capsys: pytest.CaptureFixture[str], code: int = 2
) -> None:
    with pytest.raises(SystemExit) as caught, plain_errors():
        work(uri)
    assert caught.value.code == code
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert message.count("\n") == 1
    assert len(message) < 500
    assert uri in message
    assert words in message, message


@pytest.mark.parametrize("variable", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
def test_refused_credentials(
    s3: pytest.MonkeyPatch, variable: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_table(TABLE, "s3://rebeca/refused/a.parquet", row_group_size=10)
    write_json({"format": 4}, "s3://rebeca/refused/config.json")
    s3.setenv(variable, "another")
    s3.setattr(S3FileSystem, "_cache", {})
    for read in READERS:
        assert_one_line(read, "s3://rebeca/refused", "check the path and the credentials", capsys)
    for write in WRITERS:
        assert_one_line(write, "s3://rebeca/refused", "cannot be ", capsys)


def test_a_forbidden_prefix(s3: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The reader may list everything, read below `open`, and write nothing."""
    for folder in ("open", "closed"):
        write_table(TABLE, f"s3://rebeca/{folder}/a.parquet", row_group_size=10)
        for name in ("config.json", "latest.json", "a.json"):
            write_json({"format": 4}, f"s3://rebeca/{folder}/{name}")
    s3.setenv("AWS_ACCESS_KEY_ID", "reader")
    s3.setattr(S3FileSystem, "_cache", {})
    assert read_table("s3://rebeca/open", "the table").equals(TABLE)
    for read in READERS:
        assert_one_line(read, "s3://rebeca/closed", "check the path and the credentials", capsys)
    for folder in ("open", "closed"):
        assert_one_line(WRITERS[1], f"s3://rebeca/{folder}", "cannot be written", capsys)


@pytest.mark.usefixtures("s3")
def test_a_missing_bucket_of_an_input(capsys: pytest.CaptureFixture[str]) -> None:
    """A missing bucket of an output depends on the server: this one makes it, that of AWS refuses."""
    for read in NEEDED:
        assert_one_line(read, "s3://no-such-bucket/in", "; ", capsys)
    assert read_pointer("s3://no-such-bucket/in") == (Pointer(), None)  # before the first publication
    assert_one_line(READERS[0], "s3://no-such-bucket/in", "the table s3://no-such-bucket/in: ", capsys)
    assert_one_line(READERS[0], "s3://", "s3://: names no bucket; give s3://bucket/prefix", capsys)
    for name in ("UPPER_case!", "a b"):
        assert_one_line(READERS[0], f"s3://{name}/in", "", capsys)
    assert not fsspec.filesystem("s3").exists("no-such-bucket")


@pytest.mark.timeout(60)
@pytest.mark.parametrize("endpoint", ["closed", "silent", "nonsense", "http://no.such.host.invalid"])
def test_an_unreachable_server_fails_fast(
    s3: pytest.MonkeyPatch, endpoint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    s3.setitem(s3_module.HASTY, "read_timeout", 0.2)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))  # bound, it refuses; listening, it never answers
        if endpoint == "silent":
            listener.listen()
        url = (
            f"http://127.0.0.1:{listener.getsockname()[1]}" if endpoint in ("closed", "silent") else endpoint
        )
        s3.setenv("AWS_ENDPOINT_URL", url)
        work = READERS[0] if endpoint != "closed" else WRITERS[1]
        code = 2 if endpoint == "nonsense" else 75
        assert_one_line(work, "s3://rebeca/in", "its server cannot be reached (", capsys, code)


@pytest.fixture
def silent_server(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Yield a root in a store that accepts connections and never answers. The deadline is short."""
    monkeypatch.setattr(remote, "DEADLINE_SECONDS", 0.3)
    scheme = request.param
    monkeypatch.setattr({"s3": S3Store, "gs": GcsStore}[scheme], "probe", lambda self: None)
    monkeypatch.setattr(fsspec.get_filesystem_class(scheme), "_cache", {})
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        for name in ("AWS_ENDPOINT_URL", "STORAGE_EMULATOR_HOST"):
            monkeypatch.setenv(name, url)
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION"):
            monkeypatch.setenv(name, "us-east-1")
        yield f"{scheme}://bucket/root"


@pytest.mark.timeout(60)
@pytest.mark.parametrize("silent_server", ["s3", "gs"], indirect=True)
def test_a_silent_server_ends_every_operation_at_the_deadline(silent_server: str) -> None:
    operations: list[Callable[[str], Any]] = [
        lambda uri: read_json(f"{uri}/a.json"),
        lambda uri: write_json({}, f"{uri}/a.json"),
        lambda uri: write_table(TABLE, f"{uri}/a.parquet", row_group_size=10),
        lambda uri: open_parquet(uri, "the table"),
        lambda uri: require_own(uri, "out", {"embedding.json": "clip"}),
        lambda uri: require_writable(uri, "out"),
        lambda uri: delete_files([f"{uri}/a.json"]),
        lambda uri: change_pointer(uri, lambda pointer: pointer),
        list_files,
        list_folders,
        exists,
        delete,
        read_pointer,
    ]
    for operation in operations:
        with pytest.raises(StorageError, match=r"no answer within 0\.3 s"):
            operation(silent_server)


class Hiccups(http.server.BaseHTTPRequestHandler):
    """An S3 server that is too busy for the first two reads."""

    requests = 0

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "8")
        self.send_header("Last-Modified", "Mon, 05 Jan 2026 00:00:00 GMT")
        self.end_headers()

    def do_GET(self) -> None:
        type(self).requests += 1
        body = b'{"a": 1}' if self.requests > 2 else b""
        self.send_response(200 if self.requests > 2 else 503)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def test_a_busy_server_is_retried(s3: pytest.MonkeyPatch) -> None:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hiccups)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    s3.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    assert read_json("s3://bucket/a.json") == {"a": 1}
    assert Hiccups.requests == 3
    server.shutdown()
    server.server_close()


@pytest.mark.usefixtures("s3")
def test_one_client_serves_everything() -> None:
    """Other settings would make a second client, with a listing cache of its own."""
    assert open_filesystem("s3://rebeca/a")[0] is open_filesystem("s3://rebeca/b/c")[0]
    assert open_filesystem("s3://rebeca/a")[0].s3.meta.config.retries == {
        "mode": "standard",
        "total_max_attempts": 10,
    }


def test_a_folder_below_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("in the way")
    for work in NEEDED:
        assert_one_line(work, f"{tmp_path}/file/in", "; ", capsys)
    assert_one_line(
        WRITERS[1],
        f"{tmp_path}/file/out",
        "cannot be written (Not a directory); choose another place",
        capsys,
    )
    assert_one_line(WRITERS[0], f"{tmp_path}/file", "holds something else", capsys)
    assert_one_line(WRITERS[1], f"{tmp_path}/{'x' * 300}", "cannot be written (File name too long)", capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_write_probe_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    require_writable(str(tmp_path / "a" / "b"), "out")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "a").mkdir()
    require_writable(str(tmp_path / "a"), "out")
    assert list(tmp_path.rglob("*")) == [tmp_path / "a"]
    for number, kind in ((errno.ENOSPC, StorageError), (errno.EIO, StorageError), (errno.EACCES, InputError)):
        monkeypatch.setattr(LocalFileOpener, "__init__", Mock(side_effect=OSError(number, "by plan")))
        with pytest.raises(kind, match=r"^out .*: cannot be written \(by plan\)"):
            require_writable(str(tmp_path / "a" / "b"), "out")
    assert list(tmp_path.rglob("*")) == [tmp_path / "a"]


def full(*_: Any, **__: Any) -> Any:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("moment", ["write", "close"])
def test_a_full_disk_leaves_no_half_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], moment: str
) -> None:
    monkeypatch.setattr(LocalFileOpener, moment, full, raising=False)
    with pytest.raises(SystemExit) as caught, plain_errors():
        write_table(TABLE, f"{tmp_path}/a.parquet", row_group_size=10)
    assert caught.value.code == 75
    assert capsys.readouterr().err == (
        f"error: {tmp_path}/a.parquet: cannot be written (No space left on device); "
        "check the path, its free space and the credentials\n"
    )
    monkeypatch.undo()
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_full_disk_keeps_the_last_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(tmp_path / "latest.json")
    write_json({"a": 1}, path)
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(SystemExit), plain_errors():
        write_json({"a": 2}, path)
    assert "No space left on device" in capsys.readouterr().err
    assert json.loads(Path(path).read_text()) == {"a": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["latest.json"]


def test_a_folder_that_cannot_be_listed_is_not_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Garbage collection would take its snapshots for gone, and a job would miss a part of its input."""
    for folder in ("a", "b"):
        write_table(TABLE, f"{tmp_path}/{folder}/part.parquet", row_group_size=10)
    assert list_files(str(tmp_path)) == [f"{tmp_path}/a/part.parquet", f"{tmp_path}/b/part.parquet"]
    assert list_files(f"{tmp_path}/a/part.parquet/nothing") == list_files(f"{tmp_path}/nothing") == []
    scan = os.scandir

    def broken(path: str) -> Any:
        if path == f"{tmp_path}/b":
            raise OSError(errno.EIO, "Input/output error", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", broken)
    with pytest.raises(StorageError, match=rf"^{tmp_path}: cannot be listed \(Input/output error\)"):
        list_files(str(tmp_path))
    with pytest.raises(StorageError, match=rf"^items {tmp_path}: cannot be read \(Input/output error\)"):
        open_parquet(str(tmp_path), "items")


def test_two_jobs_with_one_process_id_may_check_one_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As two machines do, whose main processes have the same number."""
    remove = LocalFileSystem.rm_file

    def meanwhile(filesystem: LocalFileSystem, path: str) -> None:
        monkeypatch.setattr(LocalFileSystem, "rm_file", remove)
        require_writable(str(tmp_path), "catalog")
        remove(filesystem, path)

    monkeypatch.setattr(LocalFileSystem, "rm_file", meanwhile)
    require_writable(str(tmp_path), "catalog")
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT])
def test_a_failure_inside_ray_ends_in_one_line(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught, plain_errors():
        raise RayTaskError(
            "stage", "a traceback\nof lines", OSError(number, "the reason", "/data/file")
        ).as_instanceof_cause()
    assert caught.value.code == 75
    assert capsys.readouterr().err.startswith("error: /data/file: the reason; ")


def test_a_mistake_in_the_code_keeps_its_traceback() -> None:
    with pytest.raises(FileNotFoundError), plain_errors():
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", "a")


def test_removing_a_missing_file_is_no_error(tmp_path: Path) -> None:
    delete(str(tmp_path / "nothing"))
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").write_text("")
    delete(str(tmp_path / "a"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[1]",
        "null",
        '{"run_id": 1}',
        '{"run_id": "a", "snapshot": "b", "fencing_token": "3"}',
        "[" * 100_000,
    ],
)
def test_a_damaged_pointer(tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "latest.json").write_text(text)
    assert_one_line(read_catalog, str(tmp_path), "latest.json is damaged; remove it", capsys)


@pytest.mark.usefixtures("s3")
def test_a_damaged_pointer_on_s3(capsys: pytest.CaptureFixture[str]) -> None:
    fsspec.filesystem("s3").pipe_file("rebeca/damaged/latest.json", b"{")
    assert_one_line(read_catalog, "s3://rebeca/damaged", "latest.json is damaged; remove it", capsys)
