"""Google Cloud Storage through gcsfs, an optional extra. The version of an object is its generation.

Credentials are those that gcsfs finds (`GOOGLE_APPLICATION_CREDENTIALS`, gcloud's login, or the metadata
server). The tests run gcsfs against a small fake server (`tests/storage/fake_gcs.py`), because
gcp-storage-emulator ignores `ifGenerationMatch`. Nothing here has run against Google's servers.
"""

import sys
from datetime import datetime
from typing import Any, ClassVar

import fsspec
import pyarrow.fs
from fsspec.spec import AbstractFileSystem

from rebeca_ray.errors import Failure, InputError, StorageError, describe
from rebeca_ray.storage.remote import (
    bucket_of_path,
    check_endpoint,
    exact_filesystem,
    remove_each,
    set_deadline,
)


class GcsStore:
    """An object or prefix in a bucket of Google Cloud Storage."""

    schemes: ClassVar[tuple[str, ...]] = ("gs", "gcs")
    example: ClassVar[str] = "gs://bucket/prefix"

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.filesystem: AbstractFileSystem
        self.path: str
        from aiohttp import ClientTimeout  # every process imports this module, few use it

        try:
            self.filesystem, self.path = fsspec.core.url_to_fs(
                uri, requests_timeout=ClientTimeout(sock_connect=5, sock_read=30)
            )
            set_deadline(self.filesystem, "_request")
        except ImportError:
            raise InputError(
                f"{uri}: gcsfs is not installed; expected for gs://; pip install 'rebeca-ray[gcs]'"
            ) from None
        except self.failure_types() as error:
            raise InputError(
                f"{uri}: its client cannot be opened ({describe(error)}); "
                "look at GOOGLE_APPLICATION_CREDENTIALS"
            ) from None
        if not bucket_of_path(self.path):
            raise InputError(f"{uri}: names no bucket; give {self.example}")

    def read_versioned(self) -> tuple[bytes, str] | None:
        self.filesystem.invalidate_cache(self.path)
        try:
            version = str(self.filesystem.info(self.path)["generation"])
            return self.filesystem.cat_file(self.path), version
        except FileNotFoundError:
            return None

    def compare_and_swap(self, data: bytes, version: str | None) -> bool:
        """Upload with `ifGenerationMatch`; generation 0 stands for no object."""
        bucket, _, key = self.path.partition("/")
        upload = self.filesystem.base.replace("/storage/v1/", "/upload/storage/v1/")
        # The writes of gcsfs know one condition only, that no object exists. So call the API itself.
        try:
            self.filesystem.call(
                "POST",
                f"{upload}b/{{}}/o",
                bucket,
                uploadType="media",
                name=key,
                ifGenerationMatch=version or "0",
                headers={"Content-Type": "application/json"},
                data=data,
            )
        except (FileExistsError, FileNotFoundError):  # 412: it was changed; 404: it was removed
            return False
        finally:
            self.filesystem.invalidate_cache(self.path)
        return True

    def put(self, data: bytes, *, content_type: str | None = None, cache_control: str | None = None) -> None:
        options: dict[str, Any] = {"content_type": content_type} if content_type else {}
        if cache_control:
            options["fixed_key_metadata"] = {"cache_control": cache_control}
        self.filesystem.pipe_file(self.path, data, **options)

    def remove(self, paths: list[str]) -> None:
        remove_each(self.filesystem, paths)

    def abort_uploads(self, before: datetime) -> int:
        return 0

    def scan_filesystem(self) -> pyarrow.fs.FileSystem:
        """Return gcsfs without read-ahead. Arrow's own client finds other credentials than gcsfs does."""
        return exact_filesystem(self.filesystem)

    def probe(self) -> None:
        endpoint = self.filesystem.base.removesuffix("/storage/v1/")
        try:
            check_endpoint(endpoint)
        except (OSError, ValueError) as error:
            kind = InputError if isinstance(error, ValueError) else StorageError  # the endpoint is no URL
            raise kind(
                f"{self.uri}: its server cannot be reached ({describe(error)}); "
                f"look at STORAGE_EMULATOR_HOST ({endpoint}) and the network"
            ) from None

    @staticmethod
    def classify(error: BaseException) -> Failure | None:
        """Return why gcsfs raised `error`: it raises OSErrors, and types of its own."""
        if sys.modules.get("gcsfs") is None:
            return None
        if type(error) is OSError and str(error).startswith("Forbidden: "):  # gcsfs sets no number
            return Failure.DENIED
        if not isinstance(error, GcsStore.failure_types()):
            return None
        return Failure.DENIED if str(getattr(error, "code", "")) in ("401", "403") else Failure.UNREACHABLE

    @staticmethod
    def failure_types() -> tuple[type[Exception], ...]:
        """Return nothing before gcsfs is in use: its import takes seconds."""
        if sys.modules.get("gcsfs") is None:
            return ()
        from aiohttp import ClientError
        from gcsfs.retry import ChecksumError, HttpError
        from google.auth.exceptions import GoogleAuthError

        return HttpError, ChecksumError, GoogleAuthError, ClientError

    @staticmethod
    def iceberg_properties() -> dict[str, str]:
        return {}
