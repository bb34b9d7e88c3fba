"""Every store as a fixture: a disk, a real S3 server, gcsfs on a fake server, adlfs on Azurite."""

import os
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import fsspec
import pytest

from tests.storage.azurite import azurite, installed
from tests.storage.fake_gcs import FakeGcs, fake_gcs

# gcsfs reads this when it is imported. It would ask Google for the kind of every bucket, over gRPC.
os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"


@pytest.fixture(scope="module")
def gcs_server() -> Iterator[FakeGcs]:
    pytest.importorskip("gcsfs", reason="the extra gcs is not installed")
    with fake_gcs() as server:
        yield server


@pytest.fixture(scope="module")
def azure_connection(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    pytest.importorskip("adlfs", reason="the extra azure is not installed")
    if installed() is None:
        pytest.skip("azurite-blob is not installed: npm install -g azurite")
    with azurite(tmp_path_factory.mktemp("azurite")) as connection:
        yield connection


@pytest.fixture
def gcs(gcs_server: FakeGcs, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", gcs_server.url)
    monkeypatch.setattr(fsspec.get_filesystem_class("gs"), "_cache", {})
    return f"gs://rebeca/{uuid4().hex}"


@pytest.fixture
def azure(azure_connection: str, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", azure_connection)
    monkeypatch.setattr(fsspec.get_filesystem_class("abfss"), "_cache", {})
    return f"abfss://rebeca/{uuid4().hex}"


@pytest.fixture(params=["disk", "s3", "gcs", "azure"])
def root(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "disk":
        return str(tmp_path)
    if request.param != "s3":
        return str(request.getfixturevalue(request.param))
    for name, value in request.getfixturevalue("s3_server").items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(fsspec.get_filesystem_class("s3"), "_cache", {})
    return f"s3://rebeca/{uuid4().hex}"
