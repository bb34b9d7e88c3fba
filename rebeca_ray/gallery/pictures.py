"""Images by reference: one column of one row group is read per request, and nothing of it is kept here.

An address names the run, the file and the row, which never change: a browser may keep the image for ever.
"""

from typing import Any, Literal

from starlette.responses import Response

from rebeca_ray.catalog.read_errors import explained
from rebeca_ray.catalog.row_groups import read_slice
from rebeca_ray.gallery.tables import Tables

BEGINNINGS = {
    b"\x89PNG": "image/png",
    b"\xff\xd8\xff": "image/jpeg",
    b"RIFF": "image/webp",
    b"GIF8": "image/gif",
    b"BM": "image/bmp",
}
FOR_EVER = {"Cache-Control": "private, max-age=31536000, immutable"}
FOR_A_WHILE = {"Cache-Control": "private, max-age=3600"}
DETAILS = ["width", "height", "safety_probability", "seed", "error"]


def read_picture(
    tables: Tables, file: int, row: int, kind: Literal["image", "thumbnail"]
) -> tuple[bytes, str] | None:
    """Return an image or a thumbnail with its media type, None where there is none."""
    value = read_row(tables, file, row, [kind])
    data = value and value.get(kind)
    if isinstance(data, dict):
        data = data["bytes"]
    return (data, media_type(data)) if data else None


def read_row(tables: Tables, file: int, row: int, columns: list[str]) -> dict[str, Any] | None:
    """Return some columns of a row of an image file, None if there is no such file or row."""
    location = tables.snapshot.image_files.get(file)
    if location is None:
        return None
    path, size = location
    with explained(tables.snapshot, path):
        rows: list[dict[str, Any]] = read_slice(
            tables.snapshot.root, path, size, row, row + 1, columns
        ).to_pylist()
    return rows[0] if rows else None


def media_type(data: bytes) -> str:
    """Return the media type of an image by its first bytes; a browser does not guess at others."""
    return next(
        (name for beginning, name in BEGINNINGS.items() if data.startswith(beginning)),
        "application/octet-stream",
    )


def picture_response(picture: tuple[bytes, str] | None, caching: dict[str, str]) -> Response:
    """Return an image to a browser; 404 without one."""
    if picture is None:
        return Response(status_code=404)
    data, media = picture
    return Response(data, media_type=media, headers=caching)
