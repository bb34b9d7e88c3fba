"""S3 and servers with its API, through s3fs and, for scans, Arrow's own client.

Endpoint and credentials come from the usual AWS environment (`AWS_ENDPOINT_URL`, `AWS_ACCESS_KEY_ID`, …)
or from the instance's role, never from a config file. The version of an object is its ETag.
"""

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import datetime
from functools import cache
from itertools import chain
from typing import Any, ClassVar

import botocore.exceptions
import fsspec
import pyarrow.fs
from botocore.exceptions import (
    BotoCoreError,
    HTTPClientError,
    NoCredentialsError,
    ParamValidationError,
    PartialCredentialsError,
)
from fsspec.spec import AbstractFileSystem

from rebeca_ray.errors import Failure, InputError, StorageError, describe
from rebeca_ray.storage.remote import bucket_of_path, set_deadline

PATIENT: dict[str, Any] = {
    "connect_timeout": 5,
    "read_timeout": 30,
    "max_pool_connections": 64,  # the default is 10, for all threads together
    "retries": {"mode": "standard", "total_max_attempts": 10},
}
HASTY: dict[str, Any] = {
    "connect_timeout": 3,
    "read_timeout": 10,
    "retries": {"mode": "standard", "total_max_attempts": 3},
}
KEYS_PER_DELETION = 1000  # the limit of S3
DELETIONS_AT_ONCE = 4
# The client refuses before it asks: no credentials, or an impossible name of a bucket.
REFUSED_HERE = (NoCredentialsError, PartialCredentialsError, ParamValidationError)
STALE = (409, 412)  # HTTP status: the object is being changed, or was changed


class S3Store:
    """An object or prefix in an S3 bucket."""

    schemes: ClassVar[tuple[str, ...]] = ("s3", "s3a")
    example: ClassVar[str] = "s3://bucket/prefix"

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.filesystem: AbstractFileSystem
        self.path: str
        # s3fs keeps one client per set of arguments. Other arguments would make a second client, with a
        # listing cache of its own: every caller gets its filesystem here.
        self.filesystem, self.path = fsspec.core.url_to_fs(uri, config_kwargs=PATIENT)
        set_deadline(self.filesystem, "_call_s3")
        self.bucket = bucket_of_path(self.path)
        if not self.bucket:
            raise InputError(f"{uri}: names no bucket; give {self.example}")

    def read_versioned(self) -> tuple[bytes, str] | None:
        self.filesystem.invalidate_cache(self.path)
        try:
            version = self.filesystem.info(self.path, refresh=True)["ETag"]
            return self.filesystem.cat_file(self.path), version
        except FileNotFoundError:
            return None

    def compare_and_swap(self, data: bytes, version: str | None) -> bool:
        condition = {"IfMatch": version} if version else {"IfNoneMatch": "*"}
        try:
            self.filesystem.pipe_file(self.path, data, **condition)
        except OSError as error:
            answer = getattr(error.__cause__, "response", {})
            status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode")
            # NoSuchKey: the object of that version was removed.
            if status in STALE or answer.get("Error", {}).get("Code") == "NoSuchKey":
                return False
            raise
        return True

    def put(self, data: bytes, *, content_type: str | None = None, cache_control: str | None = None) -> None:
        headers = {"ContentType": content_type, "CacheControl": cache_control}
        self.filesystem.pipe_file(
            self.path, data, **{name: value for name, value in headers.items() if value is not None}
        )

    def remove(self, paths: list[str]) -> None:
        """Remove objects, many per request. s3fs would ignore the refusal of a single one."""
        with ThreadPoolExecutor(DELETIONS_AT_ONCE) as pool:
            batches = [
                paths[start : start + KEYS_PER_DELETION] for start in range(0, len(paths), KEYS_PER_DELETION)
            ]
            for refusal in chain.from_iterable(pool.map(self.remove_batch, batches)):
                if refusal.get("Code") != "NoSuchKey":
                    kind = PermissionError if refusal.get("Code") == "AccessDenied" else OSError
                    raise kind(f"{refusal.get('Key')}: {refusal.get('Message') or refusal.get('Code')}")
        self.filesystem.invalidate_cache()

    def remove_batch(self, paths: list[str]) -> list[dict[str, str]]:
        """Remove the objects of one request; return the refusals of single ones."""
        keys = [{"Key": path.removeprefix(f"{self.bucket}/")} for path in paths]
        answer = self.filesystem.call_s3(
            "delete_objects", Bucket=self.bucket, Delete={"Objects": keys, "Quiet": True}
        )
        return list(answer.get("Errors", []))

    def abort_uploads(self, before: datetime) -> int:
        prefix = self.path.removeprefix(self.bucket).strip("/")
        page: dict[str, Any] = {"Bucket": self.bucket, "Prefix": f"{prefix}/" if prefix else ""}
        aborted = 0
        while True:
            answer = self.filesystem.call_s3("list_multipart_uploads", **page)
            for upload in answer.get("Uploads", []):
                if upload["Initiated"] < before:
                    with suppress(FileNotFoundError):  # it was finished or aborted in the meantime
                        self.filesystem.call_s3(
                            "abort_multipart_upload",
                            Bucket=self.bucket,
                            Key=upload["Key"],
                            UploadId=upload["UploadId"],
                        )
                        aborted += 1
            if not answer.get("IsTruncated"):
                return aborted
            page |= {"KeyMarker": answer["NextKeyMarker"], "UploadIdMarker": answer["NextUploadIdMarker"]}

    def scan_filesystem(self) -> pyarrow.fs.FileSystem:
        """Return Arrow's own client. It takes a third of the time of s3fs, and finds the same credentials."""
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
        return arrow_client(self.bucket, endpoint_url(), region)

    def probe(self) -> None:
        endpoint = endpoint_url() or "the one of AWS"
        try:
            check_reachable(endpoint, self.bucket)
        except (BotoCoreError, OSError, ValueError) as error:
            kind = InputError if isinstance(error, ValueError) else StorageError  # the endpoint is no URL
            raise kind(
                f"{self.uri}: its server cannot be reached ({describe(error)}); "
                f"look at AWS_ENDPOINT_URL ({endpoint}) and the network"
            ) from None

    @staticmethod
    def classify(error: BaseException) -> Failure | None:
        """Return why botocore or Arrow's client raised `error`. s3fs raises OSErrors, as a disk does."""
        if isinstance(error, REFUSED_HERE):
            return Failure.DENIED
        if isinstance(error, S3Store.failure_types()):
            return Failure.UNREACHABLE
        # Arrow's client raises an OSError without a number, as Arrow does for a broken file.
        text = str(error) if isinstance(error, OSError) else ""
        if "NO_SUCH_KEY" in text:
            return Failure.MISSING
        if "HTTP status 416" in text:  # the file is shorter than its listing says
            return Failure.DAMAGED
        return Failure.FAILED if type(error) is OSError and "AWS Error" in text else None

    @staticmethod
    def failure_types() -> tuple[type[Exception], ...]:
        """BotoCoreError: no credentials, no endpoint. aiohttp's ClientError: every answer was cut off.

        s3fs imports aiohttp, which takes a fifth of a second: without s3fs there are none of its errors.
        """
        aiohttp = sys.modules.get("aiohttp")
        return (BotoCoreError, aiohttp.ClientError) if aiohttp else (BotoCoreError,)

    @staticmethod
    def iceberg_properties() -> dict[str, str]:
        """Return the endpoint. pyiceberg finds everything else in the environment."""
        endpoint = endpoint_url()
        return {"s3.endpoint": endpoint} if endpoint else {}


def endpoint_url() -> str | None:
    """Return the endpoint in the environment, or None for that of AWS."""
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")


@cache
def check_reachable(endpoint: str, bucket: str) -> None:
    """Fail fast if the endpoint is unreachable. After the first success, calls use the patient retries."""
    hasty = fsspec.get_filesystem_class("s3")(config_kwargs=HASTY, skip_instance_cache=True)
    hasty.retries = 1
    try:
        hasty.call_s3("head_bucket", Bucket=bucket)
    except (botocore.exceptions.ConnectionError, HTTPClientError):
        raise
    except (OSError, BotoCoreError):  # the server refused, or was not asked: the next call says why
        pass


@cache
def arrow_client(bucket: str, endpoint: str | None, region: str | None) -> pyarrow.fs.FileSystem:
    """Return one client per bucket, endpoint and region."""
    return pyarrow.fs.S3FileSystem(
        endpoint_override=endpoint,
        region=region or ("us-east-1" if endpoint else pyarrow.fs.resolve_s3_region(bucket)),
        connect_timeout=PATIENT["connect_timeout"],
        request_timeout=PATIENT["read_timeout"],
        # A silent server ends after four times the read timeout, which is the deadline of remote.py.
        retry_strategy=pyarrow.fs.AwsStandardS3RetryStrategy(max_attempts=4),
    )
