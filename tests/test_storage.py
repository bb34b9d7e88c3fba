"""Tables and the pointer on a real S3 server: what is written is what is read, and a stale writer is refused."""

import fsspec
import pyarrow as pa
import pytest

from rebeca_ray.catalog.publish import LostRaceError, publish, read_pointer
from rebeca_ray.storage import read_json, read_table, write_json, write_table


def test_tables_and_pointer_on_s3(s3_server: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in s3_server.items():
        monkeypatch.setenv(name, value)
    root = "s3://rebeca/catalog"
    table = pa.table({"user_id": ["a", "b"], "rank": [0, 1]})
    written = write_table(table, f"{root}/items/part.parquet", row_group_size=10)
    assert written["rows"] == 2
    assert written["bytes"] == fsspec.filesystem("s3").info("rebeca/catalog/items/part.parquet")["size"]
    assert read_table(f"{root}/items", "items").equals(table)
    write_json({"a": 1}, f"{root}/one.json")
    assert read_json(f"{root}/one.json") == {"a": 1}
    assert read_json(f"{root}/none.json") is None

    assert read_pointer(root) == (None, None)
    publish(root, "snapshots/a", run_id="a", run_date="2026-01-01", epoch=1)
    publish(root, "snapshots/b", run_id="b", run_date="2026-01-02", epoch=2)
    with pytest.raises(LostRaceError, match="run b published epoch 2"):
        publish(root, "snapshots/late", run_id="late", run_date="2026-01-02", epoch=2)
    pointer, version = read_pointer(root)
    assert pointer is not None
    assert (pointer["run_id"], pointer["epoch"]) == ("b", 2)
    with pytest.raises(OSError, match=r"(?i)condition"):
        fsspec.filesystem("s3").pipe_file("rebeca/catalog/latest.json", b"{}", IfMatch='"stale"')
    assert read_pointer(root)[1] == version
