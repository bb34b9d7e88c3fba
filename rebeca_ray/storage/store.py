"""The seam between us and object stores. To add a store, write one file and add its class to `STORES`.

URI -> `open_store` -> LocalStore | S3Store | GcsStore | AzureStore -> the methods of `Store`
"""

import re
from datetime import datetime
from typing import ClassVar, Protocol

import pyarrow.fs
from fsspec.spec import AbstractFileSystem

from rebeca_ray.errors import Failure, InputError
from rebeca_ray.storage.azure import AzureStore
from rebeca_ray.storage.gcs import GcsStore
from rebeca_ray.storage.local import LocalStore
from rebeca_ray.storage.s3 import S3Store


class Store(Protocol):
    """A store, opened at one object or prefix.

    The fsspec `filesystem` does everything else, such as lists and streams. Creating a store asks no
    server.

    A path is a name, never a pattern. Do not call `rm`, `copy`, `get`, `put`, `cat` or `glob` of a
    filesystem: they take `*`, `?` and `[` for patterns.
    """

    schemes: ClassVar[tuple[str, ...]]  # the first is the canonical one
    example: ClassVar[str]  # of a URI, for error messages
    uri: str
    filesystem: AbstractFileSystem
    path: str  # of the object or prefix, inside `filesystem`

    def __init__(self, uri: str) -> None:
        """Raise InputError if `uri` is incomplete or the client of the store is not installed."""
        ...

    def read_versioned(self) -> tuple[bytes, str] | None:
        """Return the object and its version, or None if there is no object.

        If a writer comes between, the version is the older one, so that a swap with it fails.
        """
        ...

    def compare_and_swap(self, data: bytes, version: str | None) -> bool:
        """Write `data` if the object still has `version` (None: does not exist). Return whether it did.

        False may also mean that the write was stored but its answer was lost: read again to find out.
        """
        ...

    def put(self, data: bytes, *, content_type: str | None = None, cache_control: str | None = None) -> None:
        """Write the object, so that a reader sees the old one or the new one, never a part.

        Object stores keep both headers for web servers. A local disk keeps neither.
        """
        ...

    def remove(self, paths: list[str]) -> None:
        """Remove the objects with exactly these paths. A missing one is no error."""
        ...

    def abort_uploads(self, before: datetime) -> int:
        """Abort the unfinished uploads below the prefix that began before a time; return their number.

        Where the store does it by itself, as those of Google and Microsoft after a week, do nothing.
        """
        ...

    def scan_filesystem(self) -> pyarrow.fs.FileSystem:
        """Return the fastest filesystem for reads of many columns of many files below `path`."""
        ...

    def probe(self) -> None:
        """Raise InputError soon if the server cannot be reached. Success is cached."""
        ...

    @staticmethod
    def classify(error: BaseException) -> Failure | None:
        """Return why the store raised `error`, or None if it did not raise it."""
        ...

    @staticmethod
    def failure_types() -> tuple[type[Exception], ...]:
        """Return the exception types that `filesystem` raises, without importing an unused client."""
        ...

    @staticmethod
    def iceberg_properties() -> dict[str, str]:
        """Return the properties with which pyiceberg reaches the same store."""
        ...


# The local store is last: it recognises every OSError.
STORES: tuple[type[Store], ...] = (S3Store, GcsStore, AzureStore, LocalStore)


def open_store(uri: str) -> Store:
    """Return the store of `uri`, opened there. Raises InputError if it is unsupported or unreachable."""
    uri = normalize(uri)
    scheme = scheme_of(uri)
    for kind in STORES:
        if scheme in kind.schemes:
            store = kind(uri)
            store.probe()
            return store
    raise InputError(f"{uri}: storage {scheme!r} is not supported; give {examples()}")


def normalize(uri: str) -> str:
    """Return the one spelling of a location: `s3a://b/c` becomes `s3://b/c`, `file:///a` becomes `/a`.

    Raises InputError for a known scheme without `//`, for a `file://` URI with a host, and for an address
    that some client would not take literally.
    """
    if "://" in uri and "::" in uri:
        raise InputError(f"{uri}: holds '::', which chains file systems; give a name without it")
    scheme = scheme_of(uri)
    kind = next((kind for kind in STORES if scheme in kind.schemes), None)
    if "://" not in uri or kind is None:
        return uri
    rest = uri.partition("://")[2]
    local = kind is LocalStore
    for character in "?#%" if local else "?#":
        if character in rest:
            remedy = "give the plain path" if local else "give a name without it"
            raise InputError(f"{uri}: holds {character!r}, which clients read in different ways; {remedy}")
    if not local:
        require_literal_key(uri, rest)
        return f"{kind.schemes[0]}://{rest}"
    if not rest.startswith("/"):
        raise InputError(f"{uri}: has a host or a relative path; give {LocalStore.example}")
    return rest


def require_literal_key(uri: str, key: str) -> None:
    """Raise InputError for folder names that an object store keeps, and its clients or web servers drop."""
    if "//" in key:
        raise InputError(f"{uri}: holds an empty folder name (//); give an address without it")
    for folder in (".", ".."):
        if folder in key.split("/"):
            raise InputError(f"{uri}: holds the folder {folder!r}; give an address without it")


def scheme_of(uri: str) -> str:
    """Return the scheme of `uri`, "file" for a plain path."""
    if "://" in uri:
        return uri.partition("://")[0]
    prefix = re.match(r"(\w+):", uri)
    for kind in STORES:
        if prefix and prefix[1] in kind.schemes:
            raise InputError(f"{uri}: is no address; give {kind.example}")
    return "file"


def examples() -> str:
    return " or ".join(["a local path", *(kind.example for kind in STORES if kind is not LocalStore)])


def classify(error: BaseException) -> Failure | None:
    """Return why a store raised `error`, or None if no store did."""
    return next((failure for kind in STORES if (failure := kind.classify(error))), None)


def failure_types() -> tuple[type[Exception], ...]:
    """Return the exception types that the stores raise, for an `except` clause."""
    return tuple(dict.fromkeys(error for kind in STORES for error in kind.failure_types()))


def iceberg_properties() -> dict[str, str]:
    """Return the properties with which pyiceberg reaches the same stores."""
    return {name: value for kind in STORES for name, value in kind.iceberg_properties().items()}
