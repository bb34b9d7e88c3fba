"""Sign encoded images: a C2PA manifest with the source type, the model, and the id of the item.

decoded image -> its sha256 -> manifest -> signature by a key or a function -> image with the manifest

An item's id is known before, and the manifest holds the sha256 of the unsigned file. So two renderings of an
item agree in both, although two signatures never do. Nothing about a user is written.
"""

import hashlib
import importlib
import io
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from PIL import Image

import rebeca_ray
from rebeca_ray.config.decoder import C2paSettings, DecoderSettings
from rebeca_ray.errors import InputError, ResumableError, describe
from rebeca_ray.identity import read_source
from rebeca_ray.provenance.marks import CREATED, ITEM, OFFLINE, SOURCE_TYPE, defect_of, load_c2pa

THREADS = 8  # signatures at a time: a key management service is slow, and the library frees the interpreter
WAITS = (1.0, 5.0)  # seconds before another attempt at a signature that failed
# Without the first, C2PA adds a thumbnail of 1024 pixels to every image. The check finds a wrong signature.
BUILDER = {"builder": {"thumbnail": {"enabled": False}}, "verify": {"verify_after_sign": True, **OFFLINE}}

Sign = Callable[[bytes], bytes]


class ImageSigner:
    """Sign images with the certificate and the key, or the function, of the settings.

    Raises InputError for a missing package, file or function, and for a certificate that cannot be read.
    """

    def __init__(self, settings: DecoderSettings, fingerprint: str) -> None:
        self.settings, self.c2pa_settings = settings, settings.c2pa
        self.c2pa = load_c2pa("decoder.provenance c2pa")
        self.mime = f"image/{settings.image_format.lower()}"
        # A path may say more than the public should know.
        self.model = {"model": Path(settings.model).name, "decoder": fingerprint}
        self.callback = Callback(self.c2pa_settings) if self.c2pa_settings.signer else None
        self.context = self.c2pa.Context.from_dict(BUILDER, self.native_signer())
        self.threads = ThreadPoolExecutor(THREADS)

    def native_signer(self) -> Any:
        settings = self.c2pa_settings
        chain = read_pem("decoder.c2pa.certificate", str(settings.certificate))
        try:
            if self.callback:
                algorithm = self.c2pa.C2paSigningAlg[settings.algorithm.upper()]
                url = settings.time_stamp_url
                return self.c2pa.Signer.from_callback(self.callback, algorithm, chain.decode(), url)
            key = read_pem("decoder.c2pa.key", str(settings.key))
            stamp = settings.time_stamp_url and settings.time_stamp_url.encode()
            info = self.c2pa.C2paSignerInfo(settings.algorithm.encode(), chain, key, stamp)
            return self.c2pa.Signer.from_info(info)
        except (self.c2pa.C2paError, UnicodeDecodeError) as error:
            raise InputError(self.explained(error)) from None

    def sign_all(self, images: Sequence[bytes | None], item_ids: Sequence[str]) -> list[bytes | None]:
        """Sign several images at a time, in order; None stays None. Raises as `sign` does."""
        return list(self.threads.map(self.sign_if_any, images, item_ids))

    def sign_if_any(self, image: bytes | None, item_id: str) -> bytes | None:
        return image if image is None else self.sign(image, item_id)

    def sign(self, image: bytes, item_id: str) -> bytes:
        """Return an image with its manifest.

        Raises ResumableError if the signature fails again and again.
        """
        for wait in (*WAITS, None):
            try:
                return self.signed_once(image, item_id)
            except self.c2pa.C2paError as error:
                if wait is None:
                    raise ResumableError(f"{self.explained(error)}; then start the run again") from None
                time.sleep(wait)
        raise AssertionError("unreachable")

    def signed_once(self, image: bytes, item_id: str) -> bytes:
        created = {"action": CREATED, "digitalSourceType": SOURCE_TYPE}
        item = {"item_id": item_id, **self.model, "unsigned_sha256": hashlib.sha256(image).hexdigest()}
        definition = {
            "claim_generator_info": [{"name": "rebeca_ray", "version": rebeca_ray.__version__}],
            "assertions": [
                {"label": "c2pa.actions", "data": {"actions": [created]}},
                {"label": ITEM, "data": item},
            ],
        }
        signed = io.BytesIO()
        with self.c2pa.Builder(definition, self.context) as builder:
            builder.sign(self.mime, io.BytesIO(image), signed)
        return signed.getvalue()

    def explained(self, error: Exception) -> str:
        """Return one line for an error of C2PA, with the setting that causes it."""
        settings = self.c2pa_settings
        reason, certificate = describe(error), f"decoder.c2pa.certificate {settings.certificate}"
        by = f"decoder.c2pa.signer {settings.signer}" if self.callback else f"decoder.c2pa.key {settings.key}"
        if self.callback and (failure := self.callback.failure):
            return f"{by}: {failure}; make it return the signature of the bytes that it gets"
        if "resolver" in reason:
            stamp = f"decoder.c2pa.time_stamp_url {settings.time_stamp_url}"
            return f"{stamp}: gave no time stamp ({reason}); mend the address, or set it to null"
        if "does not match" in reason:
            return f"{by}: does not fit {certificate}; give the key of the first certificate in it"
        if "private key" in reason:
            return (
                f"{by}: is no PKCS#8 key in PEM for decoder.c2pa.algorithm {settings.algorithm} "
                f"({reason}); give the unencrypted key of the certificate"
            )
        return (
            f"{certificate}: cannot sign ({reason}); give a PEM chain that begins with a valid signing "
            "certificate for emailProtection or documentSigning, followed by the one that issued it"
        )


class Callback:
    """The function that `decoder.c2pa.signer` names. A failure is kept, because C2PA loses its reason."""

    def __init__(self, settings: C2paSettings) -> None:
        self.function = load_function(str(settings.signer))
        self.failures = threading.local()  # C2PA calls it in the thread that signs

    @property
    def failure(self) -> str | None:
        return getattr(self.failures, "reason", None)

    def __call__(self, data: bytes) -> bytes:
        self.failures.reason = None
        try:
            signature = self.function(data)
        except Exception as error:  # it may be any function of the user
            self.failures.reason = f"raised {type(error).__name__}: {describe(error)}"
            return b""
        if not isinstance(signature, bytes) or not signature:
            self.failures.reason = f"returned {type(signature).__name__}, expected bytes"
            return b""
        return signature


def load_function(name: str) -> Sign:
    """Return the function `module:function`. Raises InputError if it cannot be imported."""
    module, _, function = name.partition(":")
    try:
        if not function:
            raise ValueError("names no function")
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(
            f"decoder.c2pa.signer {name}: {describe(error)}; give module:function of a module on every node"
        ) from None


def read_pem(setting: str, source: str) -> bytes:
    """Return the PEM text in a file, or in the variable of `env:NAME`. Raises InputError without one."""
    text = read_source(setting, source)
    if b"-----BEGIN " not in text:
        raise InputError(f"{setting} {source}: holds no PEM text (-----BEGIN …); give one on every node")
    return text


def load_signer(settings: DecoderSettings, fingerprint: str) -> ImageSigner | None:
    """Return the signer that the settings ask for, or None. Raises as `ImageSigner` does."""
    return ImageSigner(settings, fingerprint) if settings.provenance == "c2pa" else None


def check_signing(settings: DecoderSettings) -> None:
    """Sign a small image as rendering would. Raises InputError if that fails, or if the result is invalid."""
    signer = load_signer(settings, "0" * 16)
    if signer is None:
        return
    encoded = io.BytesIO()
    Image.new("RGB", (16, 16)).save(encoded, settings.image_format)
    item_id = "0" * 32
    try:
        signed = signer.signed_once(encoded.getvalue(), item_id)
    except signer.c2pa.C2paError as error:
        raise InputError(signer.explained(error)) from None
    if defect := defect_of(signed, settings.image_format, item_id, "c2pa"):
        raise InputError(
            f"decoder.c2pa.certificate {settings.c2pa.certificate}: an image signed with it is refused: "
            f"{defect}; give a chain that C2PA accepts"
        )
