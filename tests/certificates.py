"""Certificates for tests: an authority, and the certificates that it signs."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

_DAY = timedelta(days=1)


@dataclass(frozen=True)
class Pair:
    """A certificate and its key, in PEM."""

    certificate: bytes
    key: bytes

    @property
    def serial_number(self) -> int:
        return x509.load_pem_x509_certificate(self.certificate).serial_number

    def write(self, folder: Path, name: str = "daemon") -> tuple[Path, Path]:
        """The files' paths. Existing files are replaced by renaming, each file in one step."""
        return replace(folder / f"{name}.pem", self.certificate), replace(folder / f"{name}.key", self.key)

    def key_with_passphrase(self) -> bytes:
        return _pem(_key_of(self.key), serialization.BestAvailableEncryption(b"secret"))


class Authority:
    """A CA. Its certificates are valid for 127.0.0.1 and localhost, for servers and for clients."""

    def __init__(self, name: str = "test CA", *, expired: bool = False) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = _name(name)
        builder = _builder(self._name, self._name, self._key, *_times(expired=expired))
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        self.certificate = _signed(builder, self._key)

    def issue(
        self,
        name: str = "daemon",
        *,
        host: str = "localhost",
        expired: bool = False,
        valid_from: datetime | None = None,
        valid_until: datetime | None = None,
    ) -> Pair:
        key = ec.generate_private_key(ec.SECP256R1())
        start, end = _times(expired=expired)
        builder = _builder(_name(name), self._name, key, valid_from or start, valid_until or end)
        hosts = [x509.DNSName(host), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
        builder = builder.add_extension(x509.SubjectAlternativeName(hosts), critical=False)
        return Pair(_signed(builder, self._key), _pem(key, serialization.NoEncryption()))

    def write(self, folder: Path, name: str = "ca") -> Path:
        return replace(folder / f"{name}.pem", self.certificate)


def replace(path: Path, content: bytes) -> Path:
    """Replace a file by a new one, as tools that rotate certificates do."""
    beside = path.with_name(path.name + ".new")
    beside.write_bytes(content)
    return beside.rename(path)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, start: datetime, end: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(end)
    )


def _times(*, expired: bool) -> tuple[datetime, datetime]:
    end = datetime.now(UTC) + (-_DAY if expired else _DAY)
    return end - 2 * _DAY, end


def _signed(builder: x509.CertificateBuilder, key: ec.EllipticCurvePrivateKey) -> bytes:
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def _pem(key: ec.EllipticCurvePrivateKey, encryption: serialization.KeySerializationEncryption) -> bytes:
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)


def _key_of(pem: bytes) -> ec.EllipticCurvePrivateKey:
    key = serialization.load_pem_private_key(pem, None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    return key


def _name(text: str) -> x509.Name:
    """With this common name; of "" an empty one."""
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)] if text else [])
