"""Signed images: C2PA's own reader judges them, and every bad certificate, key and function is one line."""

import hashlib
import io
import json
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from cryptography.x509.oid import ExtendedKeyUsageOID
from PIL import Image

from rebeca_ray.config.decoder import C2paSettings, DecoderSettings
from rebeca_ray.decoder.encoding import encode_image
from rebeca_ray.errors import InputError, ResumableError
from rebeca_ray.provenance import signing
from rebeca_ray.provenance.marks import SOURCE_TYPE, defect_of, read_signed, xmp_source_type
from rebeca_ray.provenance.signing import ImageSigner, check_signing, load_signer
from tests import certificates
from tests.certificates import Chain, make_chain, signed_by

c2pa = pytest.importorskip("c2pa")

ITEM, OTHER_ITEM = "ab" * 16, "cd" * 16
PLAIN = DecoderSettings(model="/private/models/tiny")


@pytest.fixture(scope="module")
def chain() -> Chain:
    return make_chain()


@pytest.fixture
def settings(tmp_path: Path, chain: Chain) -> DecoderSettings:
    return signed_by(PLAIN, tmp_path, chain)


def with_c2pa(settings: DecoderSettings, **changes: str | None) -> DecoderSettings:
    section = C2paSettings(**{**settings.c2pa.model_dump(), **changes})
    return settings.model_copy(update={"c2pa": section})


def picture(size: int = 64) -> np.ndarray:
    y, x = np.mgrid[:size, :size]
    return np.stack([4 * x % 256, 4 * y % 256, 2 * (x + y) % 256], axis=-1).astype(np.uint8)


def encoded(kind: str = "WEBP") -> bytes:
    return encode_image(picture(), kind, 90)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["WEBP", "JPEG", "PNG"])
def test_a_signed_image_is_valid_and_says_which_model_and_item_it_is(
    settings: DecoderSettings, chain: Chain, kind: str
) -> None:
    settings = settings.model_copy(update={"image_format": kind})
    image = encoded(kind)
    signed = ImageSigner(settings, "f" * 16).sign(image, ITEM)
    with c2pa.Reader(f"image/{kind.lower()}", io.BytesIO(signed)) as reader:
        assert reader.get_validation_state() == "Valid"
        text = reader.json()
    with (
        c2pa.Context.from_dict({"trust": {"trust_anchors": chain.root}}) as trusting,
        c2pa.Reader(f"image/{kind.lower()}", io.BytesIO(signed), context=trusting) as reader,
    ):
        assert reader.get_validation_state() == "Trusted"
    read = read_signed(signed, kind)
    assert read is not None
    assert read.source_type == xmp_source_type(signed) == SOURCE_TYPE
    assert read.item == {
        "item_id": ITEM,
        "model": "tiny",
        "decoder": "f" * 16,
        "unsigned_sha256": hashlib.sha256(image).hexdigest(),
    }
    assert "user" not in text
    assert "private" not in text
    (manifest,) = json.loads(text)["manifests"].values()
    assert manifest["claim_generator_info"][0]["name"] == "rebeca_ray"
    assert np.array_equal(*(np.asarray(Image.open(io.BytesIO(file))) for file in (image, signed)))


def test_two_signatures_differ_and_agree_in_item_and_unsigned_file(settings: DecoderSettings) -> None:
    signer = ImageSigner(settings, "f" * 16)
    first, second, none = signer.sign_all([encoded(), encoded(), None], [ITEM, ITEM, OTHER_ITEM])
    assert none is None
    assert first is not None
    assert second is not None
    assert first != second
    items = [(read_signed(image, "webp") or pytest.fail("unsigned")).item for image in (first, second)]
    assert items[0] == items[1]


def test_a_signature_costs_at_most_4_kb(settings: DecoderSettings) -> None:
    signed = ImageSigner(settings, "f" * 16).sign(encoded(), ITEM)
    assert len(signed) - len(encoded()) <= 4000


def test_a_changed_unsigned_or_mixed_up_image_is_a_defect(settings: DecoderSettings) -> None:
    signed = ImageSigner(settings, "f" * 16).sign(encoded(), ITEM)
    assert defect_of(signed, "webp", ITEM, "c2pa") is None
    changed = bytearray(signed)
    changed[signed.index(b"VP8 ") + 40] ^= 1
    assert defect_of(bytes(changed), "webp", ITEM, "c2pa") == (
        "its C2PA manifest is Invalid (assertion.dataHash.mismatch)"
    )
    assert defect_of(encoded(), "webp", ITEM, "c2pa") == "has no C2PA manifest"
    assert defect_of(signed, "webp", OTHER_ITEM, "c2pa") == f"its C2PA manifest is that of item {ITEM}"


def test_certificate_and_key_may_be_in_the_environment(
    settings: DecoderSettings, chain: Chain, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = with_c2pa(settings, certificate="env:TEST_CHAIN", key="env:TEST_KEY")
    with pytest.raises(InputError, match=r"decoder.c2pa.certificate env:TEST_CHAIN: the variable is not set"):
        check_signing(settings)
    monkeypatch.setenv("TEST_CHAIN", chain.certificate)
    monkeypatch.setenv("TEST_KEY", chain.key)
    check_signing(settings)


def test_a_function_may_sign(
    settings: DecoderSettings, chain: Chain, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(certificates.KEYS, "key", chain.key)
    settings = with_c2pa(settings, key=None, signer="tests.certificates:sign")
    check_signing(settings)
    signed = ImageSigner(settings, "f" * 16).sign(encoded(), ITEM)
    assert defect_of(signed, "webp", ITEM, "c2pa") is None
    monkeypatch.setitem(certificates.KEYS, "key", make_chain().key)
    with pytest.raises(InputError, match=r"tests.certificates:sign: does not fit decoder.c2pa.certificate /"):
        check_signing(settings)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("tests.certificates:fail", r"raised ConnectionError: the key service is away; make it"),
        ("tests.certificates:text_of", r"returned str, expected bytes; make it"),
        ("tests.certificates:missing", r"has no attribute 'missing'; give module:function"),
        ("no_such_module:sign", r"No module named 'no_such_module'; give module:function"),
        ("tests.certificates", r"names no function; give module:function"),
    ],
)
def test_a_function_that_cannot_sign_is_one_line(settings: DecoderSettings, name: str, reason: str) -> None:
    settings = with_c2pa(settings, key=None, signer=name)
    with pytest.raises(InputError, match=rf"^decoder.c2pa.signer {name}: .*{reason}") as caught:
        check_signing(settings)
    assert "\n" not in str(caught.value)


def test_a_function_that_fails_later_ends_a_run_that_can_be_resumed(
    settings: DecoderSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signing, "WAITS", (0.0, 0.0))
    signer = ImageSigner(with_c2pa(settings, key=None, signer="tests.certificates:fail"), "f" * 16)
    with pytest.raises(ResumableError, match=r"raised ConnectionError: .*then start the run again"):
        signer.sign(encoded(), ITEM)


def test_a_missing_file_and_one_that_is_no_pem_are_one_line(
    settings: DecoderSettings, tmp_path: Path
) -> None:
    with pytest.raises(
        InputError, match=r"^decoder.c2pa.certificate /no/chain.pem: cannot be read \(No such"
    ):
        check_signing(with_c2pa(settings, certificate="/no/chain.pem"))
    with pytest.raises(InputError, match=r"^decoder.c2pa.key /no/key.pem: cannot be read \(No such"):
        check_signing(with_c2pa(settings, key="/no/key.pem"))
    (tmp_path / "junk.pem").write_bytes(b"\0junk")
    with pytest.raises(InputError, match=r"^decoder.c2pa.key .*junk.pem: holds no PEM text"):
        check_signing(with_c2pa(settings, key=str(tmp_path / "junk.pem")))


def refusal(settings: DecoderSettings, tmp_path: Path, chain: Chain) -> str:
    with pytest.raises(InputError) as caught:
        check_signing(signed_by(settings, tmp_path, chain))
    assert "\n" not in str(caught.value)
    return str(caught.value).replace(str(tmp_path), "…")


def test_a_chain_that_cannot_sign_is_one_line(
    settings: DecoderSettings, tmp_path: Path, chain: Chain
) -> None:
    other = make_chain()
    assert refusal(settings, tmp_path, Chain(leaf=chain.leaf, root=chain.root, key=other.key)) == (
        "decoder.c2pa.key …/key.pem: does not fit decoder.c2pa.certificate …/chain.pem; "
        "give the key of the first certificate in it"
    )
    turned = refusal(settings, tmp_path, Chain(leaf=chain.root, root=chain.leaf, key=chain.key))
    assert turned.startswith(
        "decoder.c2pa.certificate …/chain.pem: cannot sign (Signature: the certificate was"
    )
    assert "is no PKCS#8 key in PEM" in refusal(
        settings, tmp_path, Chain(leaf=chain.leaf, root=chain.root, key=chain.root)
    )
    assert "cannot sign" in refusal(settings, tmp_path, make_chain(days=-1))
    for_servers = make_chain(usage=ExtendedKeyUsageOID.SERVER_AUTH)
    assert "cannot sign" in refusal(settings, tmp_path, for_servers)


def test_a_time_stamp_authority_that_is_away_is_one_line(settings: DecoderSettings) -> None:
    settings = with_c2pa(settings, time_stamp_url="http://127.0.0.1:1/stamp")
    with pytest.raises(InputError, match=r"^decoder.c2pa.time_stamp_url http://127.0.0.1:1/stamp: gave no"):
        check_signing(settings)


def test_without_the_package_signing_is_refused(
    settings: DecoderSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "c2pa", None)
    with pytest.raises(InputError, match=r"^decoder.provenance c2pa: .*pip install 'rebeca-ray\[c2pa\]'"):
        check_signing(settings)
    check_signing(PLAIN)
    assert load_signer(PLAIN, "f" * 16) is None


if __name__ == "__main__":
    # The figures of infra/docs/decoder.md: bytes and CPU time per image of 64 pixels.
    import tempfile

    certificate_chain = make_chain()
    certificates.KEYS["key"] = certificate_chain.key
    with tempfile.TemporaryDirectory() as folder:
        by_key = signed_by(PLAIN, Path(folder), certificate_chain)
        by_function = with_c2pa(by_key, key=None, signer="tests.certificates:sign")
        for label, choice in (("key", by_key), ("function", by_function)):
            signer = ImageSigner(choice, "f" * 16)
            added = len(signer.sign(encoded(), ITEM)) - len(encoded())
            started = time.process_time()
            for _ in range(500):
                signer.sign(encoded(), ITEM)
            with_encoding = time.process_time() - started
            started = time.process_time()
            for _ in range(500):
                encoded()
            seconds = with_encoding - (time.process_time() - started)
            print(f"{label}: {added:,} bytes more, {2 * seconds:.2f} ms of CPU per image")
