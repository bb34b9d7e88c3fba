"""The file system for scans of many columns of many files: on S3 Arrow's own client, in place of s3fs."""

import os
from functools import cache

import pyarrow.fs
from fsspec.spec import AbstractFileSystem

from rebeca_ray.storage.filesystem import PATIENT, arrow_filesystem


def scanning_filesystem(filesystem: AbstractFileSystem, path: str) -> pyarrow.fs.FileSystem:
    """A file system for reading many columns of many files: on S3 Arrow's own client, which takes a third of the time of s3fs.

    It finds credentials where s3fs does; endpoint and region are those of the environment. `path` begins with the bucket.
    """
    if "s3" not in filesystem.protocol:
        return arrow_filesystem(filesystem)
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    return native_s3(
        path.split("/")[0], endpoint, os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    )


@cache
def native_s3(bucket: str, endpoint: str | None, region: str | None) -> pyarrow.fs.FileSystem:
    return pyarrow.fs.S3FileSystem(
        endpoint_override=endpoint,
        region=region or ("us-east-1" if endpoint else pyarrow.fs.resolve_s3_region(bucket)),
        connect_timeout=PATIENT["connect_timeout"],
        request_timeout=PATIENT["read_timeout"],
        retry_strategy=pyarrow.fs.AwsStandardS3RetryStrategy(
            max_attempts=PATIENT["retries"]["total_max_attempts"]
        ),
    )
