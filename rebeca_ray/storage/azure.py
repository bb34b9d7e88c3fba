"""Azure Blob Storage through adlfs, an optional extra. The version of a blob is its ETag.

Account and credentials come from the environment that adlfs reads (`AZURE_STORAGE_ACCOUNT_NAME`,
`AZURE_STORAGE_CONNECTION_STRING`, …) or from the machine's identity. The tests run adlfs against Azurite
where it is installed. Nothing here has run against Microsoft's servers.
"""

import sys
from datetime import datetime
from typing import Any, ClassVar

import fsspec
import pyarrow.fs
from fsspec.spec import AbstractFileSystem

from rebeca_ray.errors import Failure, InputError, StorageError, describe
from rebeca_ray.storage.remote import bucket_of_path, check_endpoint, exact_filesystem, remove_each


class AzureStore:
    """A blob or prefix in a container of Azure Blob Storage."""

    schemes: ClassVar[tuple[str, ...]] = ("abfss", "abfs", "az")
    example: ClassVar[str] = "abfss://container@account.dfs.core.windows.net/prefix"

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.filesystem: AbstractFileSystem
        self.path: str
        try:
            self.filesystem, self.path = fsspec.core.url_to_fs(uri)
        except ImportError:
            raise InputError(
                f"{uri}: adlfs is not installed; expected for abfss://; pip install 'rebeca-ray[azure]'"
            ) from None
        except ValueError as error:  # no account, or a connection string that is none
            raise InputError(
                f"{uri}: its client cannot be opened ({describe(error)}); give {self.example}, "
                "or set AZURE_STORAGE_CONNECTION_STRING"
            ) from None
        if not bucket_of_path(self.path):
            raise InputError(f"{uri}: names no container; give {self.example}")

    def read_versioned(self) -> tuple[bytes, str] | None:
        self.filesystem.invalidate_cache()
        try:
            version = str(self.filesystem.info(self.path, refresh=True)["etag"])
            return self.filesystem.cat_file(self.path), version
        except FileNotFoundError:
            return None

    def compare_and_swap(self, data: bytes, version: str | None) -> bool:
        from azure.core import MatchConditions
        from azure.core.exceptions import HttpResponseError

        condition: dict[str, Any] = {"overwrite": False}
        if version is not None:
            condition = {"etag": version, "match_condition": MatchConditions.IfNotModified}
        try:
            self.filesystem.pipe_file(self.path, data, **condition)
        except FileExistsError:
            return False
        except HttpResponseError as error:
            # 409: being changed; 412: changed or removed
            if error.status_code in (409, 412):
                return False
            raise
        return True

    def put(self, data: bytes, *, content_type: str | None = None, cache_control: str | None = None) -> None:
        headers = {"content_type": content_type, "cache_control": cache_control}
        given = {name: value for name, value in headers.items() if value is not None}
        self.filesystem.pipe_file(self.path, data, content_settings=given or None)

    def remove(self, paths: list[str]) -> None:
        remove_each(self.filesystem, paths)

    def abort_uploads(self, before: datetime) -> int:
        return 0

    def scan_filesystem(self) -> pyarrow.fs.FileSystem:
        """Return adlfs without read-ahead. Arrow's own client finds other credentials than adlfs does."""
        return exact_filesystem(self.filesystem)

    def probe(self) -> None:
        endpoint = str(self.filesystem.service_client.url)
        try:
            check_endpoint(endpoint)
        except (OSError, ValueError) as error:
            kind = InputError if isinstance(error, ValueError) else StorageError  # the endpoint is no URL
            raise kind(
                f"{self.uri}: its server cannot be reached ({describe(error)}); "
                f"look at the account ({endpoint}) and the network"
            ) from None

    @staticmethod
    def classify(error: BaseException) -> Failure | None:
        """Return why adlfs raised `error`: it raises OSErrors, and those of Azure's own client."""
        if not isinstance(error, AzureStore.failure_types()):
            return None
        status = getattr(error, "status_code", None)
        return {404: Failure.MISSING, 401: Failure.DENIED, 403: Failure.DENIED}.get(
            status or 0, Failure.UNREACHABLE
        )

    @staticmethod
    def failure_types() -> tuple[type[Exception], ...]:
        """Return nothing before Azure's client is in use: its import takes time."""
        if "azure.core.exceptions" not in sys.modules:
            return ()
        from azure.core.exceptions import AzureError

        return (AzureError,)

    @staticmethod
    def iceberg_properties() -> dict[str, str]:
        return {}
