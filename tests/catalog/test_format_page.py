"""The page on the format: its example runs, on golden files, and it names every column with its type."""

import re
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest

from rebeca_ray import schemas
from rebeca_ray.catalog.read import read_catalog
from rebeca_ray.schemas import TABLES
from tests.catalog.test_golden import GOLDEN
from tests.conftest import REPO, D

PAGE = (REPO / "infra" / "docs" / "catalog-format.md").read_text()


@pytest.mark.parametrize("user", ["user-1", "stranger", "nobody", ""])
def test_the_example_reads_a_users_items_and_image(tmp_path: Path, user: str) -> None:
    (tmp_path / "example.py").write_text(PAGE.split("```python\n")[1].split("```")[0])
    assert not re.search(
        "import (?!hashlib|json|sys|Path|pyarrow.parquet)", (tmp_path / "example.py").read_text()
    )
    root = GOLDEN / f"v{schemas.SCHEMA_VERSION}"
    command = [sys.executable, "example.py", str(root), user]
    lines = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    snapshot = read_catalog(str(root))
    expected = snapshot.for_user(user)
    assert lines == [f"{row['rank']} {row['item_id']}" for row in expected.to_pylist()]
    assert bool(lines) == (user != "nobody")
    images = [file.read_bytes() for file in tmp_path.glob("*.png")]
    assert images == snapshot.images(expected)[:1]


def test_every_column_is_named_with_its_type_and_nothing_else_is() -> None:
    documented: dict[str, dict[str, str]] = {}
    for line in PAGE.split("## Tables")[1].split("\nTo follow")[0].splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[0] in TABLES:
            columns = documented.setdefault(cells[0], {})
        elif cells[0].startswith("`") and len(cells) == 2:
            columns |= dict.fromkeys(
                re.findall("`(.*?)`", cells[0]),
                re.split("[;:] ", cells[1])[0] if "struct" not in cells[1] else cells[1].split(";")[0],
            )
    expected = {name: {field.name: plainly(field) for field in schemas.table(name, D)} for name in TABLES}
    assert documented == expected


def plainly(field: pa.Field) -> str:
    """A type as the page writes it."""
    kind = (
        f"fixed_size_list<{field.type.value_type}>[embed_dim]"
        if pa.types.is_fixed_size_list(field.type)
        else str(field.type)
    )
    kind = (
        {"float": "float32", "date32[day]": "date32"}.get(kind, kind)
        .replace("<float>", "<float32>")
        .replace("tz=", "")
    )
    return kind + "?" * field.nullable


def test_the_version_in_the_example_is_the_current_one() -> None:
    assert f'["schema_version"] > {schemas.SCHEMA_VERSION}:' in PAGE
