"""The marks of an image: write the XMP packet, read it back, and let C2PA's reader judge a signed image.

The XMP packet is a statement without a proof. A C2PA manifest is signed and holds a hash of the file, so a
changed image is recognised. Both name the same digital source type of IPTC.
"""

import importlib
import io
import re
from types import ModuleType
from typing import Any, NamedTuple

from rebeca_ray.errors import InputError, describe
from rebeca_ray.pixels import open_image
from rebeca_ray.storage.objects import JsonObject

SOURCE_TYPE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
XMP_PACKET = b"""<?xpacket begin="\xef\xbb\xbf" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
<rdf:Description rdf:about="" xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/"
Iptc4xmpExt:DigitalSourceType="%b"/>
</rdf:RDF></x:xmpmeta><?xpacket end="r"?>""" % SOURCE_TYPE.encode()
STATEMENT = re.compile(r'DigitalSourceType\s*=\s*"([^"]*)"')
CREATED, ITEM = "c2pa.created", "rebeca.item"  # an action of C2PA, and our assertion
GOOD_STATES = ("Valid", "Trusted")  # Trusted: its certificate also leads to one that the reader trusts
OFFLINE = {"remote_manifest_fetch": False, "ocsp_fetch": False}  # of C2PA's settings: reading asks no server


class SignedItem(NamedTuple):
    """The statements of a signed image: C2PA's judgement, the source type, and the item it was made for."""

    state: str
    reasons: list[str]  # codes of C2PA, if the state is Invalid
    source_type: str | None
    item: JsonObject


def load_c2pa(setting: str) -> ModuleType:
    """Return the package c2pa. Raises InputError, naming `setting`, where it is not installed."""
    try:
        return importlib.import_module("c2pa")
    except (ImportError, OSError) as error:  # OSError: its library does not fit this machine
        raise InputError(
            f"{setting}: the package c2pa cannot be loaded ({describe(error)}); "
            "pip install 'rebeca-ray[c2pa]' on every node"
        ) from None


def xmp_source_type(image: bytes) -> str | None:
    """Return the digital source type in the XMP packet of an image, or None.

    Raises InputError for a broken image.
    """
    info = open_image(image).info
    packet = info.get("xmp") or info.get("XML:com.adobe.xmp") or b""
    text = packet.decode("utf-8", "replace") if isinstance(packet, bytes) else str(packet)
    match = STATEMENT.search(text)
    return match[1] if match else None


def read_signed(image: bytes, kind: str) -> SignedItem | None:
    """Return the statements of the C2PA manifest in an image of a `kind` such as webp; None without one.

    Raises InputError without the package c2pa, and for a manifest that cannot be read.
    """
    c2pa = load_c2pa("provenance")
    try:
        with (
            c2pa.Context.from_dict({"verify": OFFLINE}) as context,
            c2pa.Reader(f"image/{kind.lower()}", io.BytesIO(image), context=context) as reader,
        ):
            state = str(reader.get_validation_state())
            results = reader.get_validation_results() or {}
            manifest = reader.get_active_manifest() or {}
    except c2pa.C2paError.ManifestNotFound:
        return None
    except c2pa.C2paError as error:
        raise InputError(f"its C2PA manifest cannot be read ({describe(error)})") from None
    failures = results.get("activeManifest", {}).get("failure", [])
    return SignedItem(
        state=state,
        reasons=[failure["code"] for failure in failures if "untrusted" not in failure["code"]],
        source_type=created_source_type(manifest),
        item=next((data for label, data in assertions(manifest) if label == ITEM), {}),
    )


def assertions(manifest: JsonObject) -> list[tuple[str, Any]]:
    return [(entry["label"], entry.get("data", {})) for entry in manifest.get("assertions", [])]


def created_source_type(manifest: JsonObject) -> str | None:
    """Return the digital source type of the action `c2pa.created`, or None."""
    for label, data in assertions(manifest):
        if label.startswith("c2pa.actions"):
            for action in data.get("actions", []):
                if action.get("action") == CREATED:
                    return action.get("digitalSourceType")
    return None


def defect_of(image: bytes, kind: str, item_id: str, provenance: str) -> str | None:
    """Return the reason why an image does not have the marks of `provenance`; None if it has them."""
    try:
        if provenance == "none":
            return None
        if provenance == "xmp":
            stated = xmp_source_type(image)
            return None if stated == SOURCE_TYPE else f"its XMP states the source type {stated}"
        signed = read_signed(image, kind)
    except InputError as error:
        return str(error)
    if signed is None:
        return "has no C2PA manifest"
    if signed.state not in GOOD_STATES:
        return f"its C2PA manifest is {signed.state} ({', '.join(signed.reasons) or 'no reason given'})"
    if signed.source_type != SOURCE_TYPE:
        return f"its C2PA manifest states the source type {signed.source_type}"
    if signed.item.get("item_id") != item_id:
        return f"its C2PA manifest is that of item {signed.item.get('item_id')}"
    return None
