"""Show results inline in a notebook: images as a grid, figures as a table.

A notebook shows the HTML of `_repr_html_` below a cell, and saves it in its file. All texts are escaped, and
a grid is bounded.
"""

import io
from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from typing import overload

import pyarrow as pa
from PIL import Image

from rebeca_ray.errors import InputError
from rebeca_ray.pixels import data_uri, see_image

MAX_SHOWN = 60  # images below one cell
MAX_BYTES, MAX_SIDE = 30_000, 256  # of an image in a grid; a larger one is made smaller
CELL = (
    "display:inline-block;vertical-align:top;width:128px;margin:0 8px 8px 0;font-size:11px;"
    "overflow-wrap:anywhere"  # in a long user id
)
PICTURE = "width:128px;height:auto"
EMPTY = "width:126px;height:126px;border:1px dashed"


@dataclass(frozen=True, eq=False, repr=False)
class Images:
    """Rows with images, best first per user. A notebook shows them as a grid.

    ```python
    images = rr.decode(embeddings, "generate.yaml")
    images.table  # the rows, as a pyarrow table with a column `image`
    images[0]  # the first image in full size, as Pillow has it
    images[60:]  # the rows after the first grid
    ```

    `left_out` items of a snapshot have no row, because a grid has no room for them.
    """

    table: pa.Table
    left_out: int = 0

    def __len__(self) -> int:
        return int(self.table.num_rows)

    @overload
    def __getitem__(self, row: int) -> Image.Image: ...

    @overload
    def __getitem__(self, row: slice) -> "Images": ...

    def __getitem__(self, row: "int | slice") -> "Image.Image | Images":
        """Return one image, or some rows. Raises IndexError past the end, InputError for a missing image."""
        if isinstance(row, slice):
            return Images(self.table.take(pa.array(range(len(self))[row], pa.int64())))
        index = range(len(self))[row]
        image = self.table["image"][index].as_py()
        if image is None:
            raise InputError(f"image {index}: is missing ({reason_of(self.table, index)}); take another row")
        return see_image(image["bytes"])

    def __repr__(self) -> str:
        missing = self.table["image"].null_count
        users = f", users: {len(self.table['user_id'].unique()):,}" if "user_id" in names(self.table) else ""
        return f"images: {len(self) - missing:,}{users}" + f", rows without an image: {missing:,}" * (
            missing > 0
        )

    def _repr_html_(self) -> str:
        cells = [cell(self.table, row) for row in range(min(MAX_SHOWN, len(self)))]
        rest = f"; the first {MAX_SHOWN} are shown, [{MAX_SHOWN}:] holds the rest" * (len(self) > MAX_SHOWN)
        if self.left_out:
            rest += f"; {self.left_out:,} more items are left out, name fewer users to see them"
        return f"<p>{escape(repr(self))}{rest}</p><div>{''.join(cells)}</div>"


def cell(table: pa.Table, row: int) -> str:
    """Return one image with its caption. A row without an image shows the reason in its place."""
    caption = "<br>".join(map(escape, caption_of(table, row)))
    image = table["image"][row].as_py()
    if image is None:
        picture = f'<div style="{EMPTY}">{escape(reason_of(table, row))}</div>'
    else:
        address = data_uri(small(image["bytes"]))
        picture = f'<img style="{PICTURE}" src="{address}" alt="Image of row {row}">'
    return f'<figure style="{CELL}">{picture}<figcaption>{caption}</figcaption></figure>'


def caption_of(table: pa.Table, row: int) -> list[str]:
    """Return the lines of a caption: user, rank and like probability, as far as the table has them."""
    values = {
        name: table[name][row].as_py()
        for name in ("user_id", "rank", "like_probability")
        if name in names(table)
    }
    lines = []
    if (user := values.get("user_id")) is not None:
        lines.append(str(user) or "population pool")
    if (rank := values.get("rank")) is not None:
        lines.append(f"rank {rank}")
    if (like := values.get("like_probability")) is not None:
        lines.append(f"like {like:.2f}")
    return lines or [f"row {row}"]


def reason_of(table: pa.Table, row: int) -> str:
    """Return why a row has no image."""
    error = table["error"][row].as_py() if "error" in names(table) else None
    return error or "no image fit to be shown"


def names(table: pa.Table) -> list[str]:
    return list(table.column_names)


def small(encoded: bytes) -> bytes:
    """Return an image for a grid: as it is, or smaller if it is large."""
    if len(encoded) <= MAX_BYTES:
        return encoded
    image, file = see_image(encoded), io.BytesIO()
    image.thumbnail((MAX_SIDE, MAX_SIDE))
    image.save(file, "WEBP", quality=85)
    return file.getvalue()


def figures_html(title: str, figures: Mapping[str, float]) -> str:
    """Return a title, and a line per figure, as an HTML table."""
    rows = "".join(
        f"<tr><th>{escape(name.replace('_', ' '))}</th>"
        f"<td>{f'{value:,}' if isinstance(value, int) else f'{value:.4g}'}</td></tr>"
        for name, value in figures.items()
    )
    return f"<p>{escape(title)}</p><table>{rows}</table>"
