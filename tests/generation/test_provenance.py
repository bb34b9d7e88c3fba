"""Signed nights: an item keeps its id and its pixels, is signed once, and `catalog verify` reads its mark."""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from typer.testing import CliRunner

from rebeca_ray import schemas
from rebeca_ray.catalog.provenance import SHOWN, check_provenance
from rebeca_ray.catalog.read import Snapshot
from rebeca_ray.cli.commands import app
from rebeca_ray.config.decoder import C2paSettings
from rebeca_ray.config.jobs import GenerateConfig
from rebeca_ray.config.load import parse_config
from rebeca_ray.decoder.triton_client import parameters
from rebeca_ray.errors import InputError
from rebeca_ray.generation.pipeline import generate_catalog
from rebeca_ray.provenance.marks import read_signed
from rebeca_ray.storage.parquet import write_table
from tests.catalog.test_verify import listed_again, path_of
from tests.certificates import make_chain, signed_by
from tests.conftest import USERS, prepare
from tests.generation.test_nights import change_digest, counts, night

needs_c2pa = pytest.mark.usefixtures("_c2pa")


@pytest.fixture
def _c2pa() -> None:
    pytest.importorskip("c2pa")


@pytest.fixture
def signed(config: GenerateConfig, tmp_path: Path) -> GenerateConfig:
    decoder = signed_by(config.decoder, tmp_path, make_chain())
    return config.model_copy(update={"decoder": decoder, "catalog": f"{config.catalog}-signed"})


def with_provenance(config: GenerateConfig, provenance: str) -> GenerateConfig:
    decoder = config.decoder.model_copy(update={"provenance": provenance})
    return config.model_copy(update={"decoder": decoder})


def images_of(snapshot: Snapshot) -> dict[str, bytes]:
    """Return the encoded images of a snapshot by item."""
    items = snapshot.items()
    return dict(zip(items["item_id"].to_pylist(), snapshot.images(items), strict=True))


def pixels(image: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(image)))


@needs_c2pa
def test_a_signed_item_has_the_id_and_the_pixels_of_the_unsigned_one(
    config: GenerateConfig, signed: GenerateConfig
) -> None:
    plain, first = images_of(night(config, USERS[:2])[1]), images_of(night(signed, USERS[:2])[1])
    again = images_of(night(signed.model_copy(update={"catalog": f"{signed.catalog}-2"}), USERS[:2])[1])
    assert plain.keys() == first.keys() == again.keys()
    for item, image in first.items():
        assert np.array_equal(pixels(image), pixels(plain[item]))
        assert image != again[item]
        statements = [read_signed(file, "png") for file in (image, again[item])]
        assert statements[0] == statements[1]
        assert statements[0] is not None
        assert (statements[0].state, statements[0].item["item_id"]) == ("Valid", item)


@needs_c2pa
def test_carried_and_compacted_images_are_not_signed_again(signed: GenerateConfig) -> None:
    _, first = night(signed, USERS)
    before = images_of(first)
    for user in USERS[:4]:
        change_digest(signed, user)
    manifest, second = night(signed, USERS, 1)
    assert counts(manifest, "new", "carried") == (12, 9)
    assert any("compacted" in path for path in second.paths("images"))
    after = images_of(second)
    kept = before.keys() & after.keys()
    assert len(kept) == 9
    assert {item: before[item] for item in kept} == {item: after[item] for item in kept}
    outcome = check_provenance(second, "full")
    assert (outcome.checked, outcome.failed) == ({"c2pa": 21}, 0)


@needs_c2pa
def test_a_catalog_that_is_signed_from_tonight_on_keeps_its_carried_images(
    config: GenerateConfig, signed: GenerateConfig
) -> None:
    signed = signed.model_copy(update={"catalog": config.catalog})
    _, first = night(config, USERS)
    for user in USERS[:4]:
        change_digest(config, user)
    manifest, second = night(signed, USERS, 1)
    assert counts(manifest, "new", "carried") == (12, 9)
    assert check_provenance(first, "full").checked == {"xmp": 21}
    outcome = check_provenance(second, "full")  # a compacted file has the weakest mark of its sources
    assert (outcome.checked, outcome.failed) == ({"c2pa": 12, "xmp": 9}, 0)


@needs_c2pa
def test_secrets_and_their_locations_reach_no_file_of_a_catalog(
    signed: GenerateConfig, tmp_path: Path
) -> None:
    night(signed, USERS[:2])
    prepare(signed)  # leaves the description of an unfinished run
    key = Path(str(signed.decoder.c2pa.key)).read_text().splitlines()[1].encode()
    files = [path for path in Path(signed.catalog).rglob("*") if path.is_file()]
    assert files
    for path in files:
        data = path.read_bytes()
        assert key not in data
        assert str(signed.decoder.c2pa.key).encode() not in data


@needs_c2pa
def test_a_changed_image_is_found_by_item(signed: GenerateConfig) -> None:
    _, snapshot = night(signed, USERS[:5])
    path = path_of(snapshot, "images")
    rows = pq.read_table(path)
    images = rows["image"].to_pylist()
    for image in images[:12]:
        changed = bytearray(image["bytes"])
        changed[changed.index(b"IDAT") + 20] ^= 1
        image["bytes"] = bytes(changed)
    column = pa.array(images, schemas.IMAGE)
    write_table(rows.set_column(1, rows.schema.field("image"), column), str(path), row_group_size=100)
    outcome = check_provenance(listed_again(snapshot, "images"), "full")
    assert (outcome.checked, outcome.failed, len(outcome.defects)) == ({"c2pa": 15}, 12, SHOWN + 1)
    item = rows["item_id"][0].as_py()
    assert outcome.defects[0].endswith(
        f".parquet: item {item}: its C2PA manifest is Invalid (assertion.dataHash.mismatch)"
    )
    assert outcome.defects[-1] == "provenance: 2 more images without their mark"


def test_images_without_a_mark_are_a_choice_and_missing_xmp_is_damage(config: GenerateConfig) -> None:
    none = with_provenance(config, "none")
    _, snapshot = night(none, USERS[:2])
    assert b"DigitalSourceType" not in path_of(snapshot, "images").read_bytes()
    assert check_provenance(snapshot, "sample").checked == {"none": 6}
    path = path_of(snapshot, "images")
    rows = pq.read_table(path)
    write_table(rows.replace_schema_metadata(schemas.IMAGES.metadata), str(path), row_group_size=100)
    outcome = check_provenance(listed_again(snapshot, "images"), "sample")
    assert (outcome.checked, outcome.failed) == ({"xmp": 6}, 6)
    assert outcome.defects[0].endswith(": its XMP states the source type None")


def test_the_command_reports_how_many_were_checked_and_damage_ends_with_4(config: GenerateConfig) -> None:
    _, snapshot = night(config, USERS[:2])
    command = ["catalog", "verify", config.catalog, "--provenance"]
    outcome = CliRunner().invoke(app, command)
    assert outcome.exit_code == 0, outcome.output
    assert outcome.stdout.splitlines()[0] == "provenance: 6 images checked (6 xmp), 0 failed"
    document = json.loads(CliRunner().invoke(app, [*command, "--json"]).stdout)
    assert document["provenance"] == {"checked": {"xmp": 6}, "failed": 0}

    path = path_of(snapshot, "images")
    rows = pq.read_table(path)
    bare = [
        {"bytes": pixels_only(image["bytes"]), "path": image["path"]} for image in rows["image"].to_pylist()
    ]
    column = pa.array(bare, schemas.IMAGE)
    written = write_table(
        rows.set_column(1, rows.schema.field("image"), column), str(path), row_group_size=100
    )
    relist(snapshot, written["sha256"], written["bytes"])
    outcome = CliRunner().invoke(app, command)
    assert outcome.exit_code == 4
    lines = outcome.stdout.splitlines()
    assert f"item {rows['item_id'][0].as_py()}: its XMP states the source type None" in lines[0]
    assert lines[-1] == "provenance: 6 images checked (6 xmp), 6 failed"


def pixels_only(image: bytes) -> bytes:
    """Return an image without its metadata, as a tool that strips them would."""
    out = io.BytesIO()
    Image.open(io.BytesIO(image)).save(out, "PNG")
    return out.getvalue()


def relist(snapshot: Snapshot, sha256: str, size: int) -> None:
    """Write the file list and the manifest again, for a changed image file."""
    rows = snapshot.files.to_pylist()
    rows = [{**row, "sha256": sha256, "bytes": size} if row["table"] == "images" else row for row in rows]
    listing = snapshot.manifest.files
    table = pa.Table.from_pylist(rows, schema=snapshot.files.schema)
    written = write_table(table, f"{snapshot.root}/{listing.path}", row_group_size=100)
    manifest = snapshot.manifest.model_copy(
        update={"files": listing.model_copy(update={key: written[key] for key in ("bytes", "sha256")})}  # type: ignore[literal-required]
    )
    Path(snapshot.root, snapshot.path, "manifest.json").write_text(manifest.model_dump_json())


@needs_c2pa
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"certificate": "/no/chain.pem"}, r"^decoder.c2pa.certificate /no/chain.pem: cannot be read"),
        ({"key": "env:NO_SUCH_KEY"}, r"^decoder.c2pa.key env:NO_SUCH_KEY: the variable is not set"),
        (
            {"key": None, "signer": "tests.certificates:fail"},
            r"^decoder.c2pa.signer .*raised ConnectionError",
        ),
    ],
)
def test_bad_signing_settings_end_a_job_before_it_writes(
    signed: GenerateConfig, changes: dict[str, str | None], reason: str
) -> None:
    section = C2paSettings(**{**signed.decoder.c2pa.model_dump(), **changes})
    decoder = signed.decoder.model_copy(update={"c2pa": section})
    with pytest.raises(InputError, match=reason):
        generate_catalog(signed.model_copy(update={"decoder": decoder}), in_process=True)
    assert not Path(signed.catalog).exists()


@pytest.mark.parametrize(
    ("section", "reason"),
    [
        ({}, "provenance c2pa needs c2pa.certificate; set it"),
        ({"certificate": "a"}, "needs one of c2pa.key and c2pa.signer"),
        ({"certificate": "a", "key": "b", "signer": "c:d"}, "needs one of c2pa.key and c2pa.signer"),
        ({"certificate": "a", "key": "env:1"}, "names no environment variable"),
        ({"certificate": "s3://a/b", "key": "b"}, "is no local file"),
        ({"certificate": "a", "key": "b", "time_stamp_url": "ftp://a"}, "is no address"),
        ({"certificate": "a", "key": "-----BEGIN PRIVATE KEY-----MIGHAgEA"}, "is the text itself"),
    ],
)
def test_a_config_that_cannot_sign_is_refused(
    config: GenerateConfig, section: dict[str, str], reason: str
) -> None:
    values = {**config.decoder.model_dump(), "provenance": "c2pa", "c2pa": section}
    with pytest.raises(InputError, match=reason) as caught:
        parse_config(type(config.decoder), values, where="config")
    assert "MIGHAgEA" not in str(caught.value)


def test_a_server_writes_the_packet_and_never_signs(config: GenerateConfig, tmp_path: Path) -> None:
    assert "provenance" not in parameters(signed_by(config.decoder, tmp_path, make_chain()))
    assert parameters(with_provenance(config, "none").decoder)["provenance"] == '"none"'
