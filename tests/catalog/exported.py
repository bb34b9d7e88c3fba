"""What an export of images holds."""

import fsspec

from rebeca_ray.catalog.exports.image_objects import read_export
from rebeca_ray.storage.filesystem import list_files
from rebeca_ray.storage.parquet import read_table
from tests.catalog.conftest import Rows

CDN = "https://cdn.example.com/stickers"


def objects(out: str) -> dict[str, bytes]:
    """Return every object of an export by its key."""
    files = list_files(f"{out}/objects")
    return {file.removeprefix(f"{out}/"): fsspec.open(file).open().read() for file in files}


def urls(out: str) -> Rows:
    export = read_export(out)
    assert export is not None
    return [row for path in export.files for row in read_table(f"{out}/{path}", "export").to_pylist()]
