"""Certificates for the tests of C2PA: a root, a signing certificate below it, and a function that signs."""

import datetime
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from rebeca_ray.config.decoder import C2paSettings, DecoderSettings

DAY = datetime.timedelta(days=1)


@dataclass(frozen=True, kw_only=True)
class Chain:
    """A certificate chain and its private key, as PEM texts."""

    leaf: str
    root: str
    key: str

    @property
    def certificate(self) -> str:
        return self.leaf + self.root


def make_chain(
    *, days: int = 30, usage: x509.ObjectIdentifier = ExtendedKeyUsageOID.EMAIL_PROTECTION
) -> Chain:
    """Make a root and a certificate that may sign C2PA manifests and ends in so many days."""
    root_key, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    root = certificate("root", "root", root_key, root_key, days=30).sign(root_key, hashes.SHA256())
    leaf = certificate("leaf", "root", key, root_key, days=days)
    leaf = leaf.add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
    return Chain(
        leaf=leaf.sign(root_key, hashes.SHA256()).public_bytes(Encoding.PEM).decode(),
        root=root.public_bytes(Encoding.PEM).decode(),
        key=key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode(),
    )


def certificate(
    name: str,
    issuer: str,
    key: ec.EllipticCurvePrivateKey,
    issuer_key: ec.EllipticCurvePrivateKey,
    *,
    days: int,
) -> x509.CertificateBuilder:
    is_root = name == issuer
    now = datetime.datetime.now(datetime.UTC)
    usage = x509.KeyUsage(
        digital_signature=not is_root,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=is_root,
        crl_sign=is_root,
        encipher_only=False,
        decipher_only=False,
    )
    authority = x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key())
    return (
        x509.CertificateBuilder()
        .subject_name(named(name))
        .issuer_name(named(issuer))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - 60 * DAY)
        .not_valid_after(now + days * DAY)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(authority, critical=False)
        .add_extension(x509.BasicConstraints(ca=is_root, path_length=None), critical=True)
        .add_extension(usage, critical=True)
    )


def named(name: str) -> x509.Name:
    organization = x509.NameAttribute(NameOID.ORGANIZATION_NAME, "rebeca_ray tests")
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name), organization])


def signed_by(decoder: DecoderSettings, folder: Path, chain: Chain) -> DecoderSettings:
    """Return settings that sign with a chain, whose files are written into a folder."""
    (folder / "chain.pem").write_text(chain.certificate)
    (folder / "key.pem").write_text(chain.key)
    section = C2paSettings(certificate=str(folder / "chain.pem"), key=str(folder / "key.pem"))
    return decoder.model_copy(update={"provenance": "c2pa", "c2pa": section})


KEYS: dict[str, str] = {}  # of the function below


def sign(data: bytes) -> bytes:
    """Sign as a key management service would: the key stays here."""
    key = load_pem_private_key(KEYS["key"].encode(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    return key.sign(data, ec.ECDSA(hashes.SHA256()))


def fail(data: bytes) -> bytes:
    raise ConnectionError("the key service is away")


def text_of(data: bytes) -> str:
    return "no bytes"
