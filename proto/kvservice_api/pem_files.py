"""The PEM files of TLS, for the daemon and the client: reads and checks them, and detects changes."""

from __future__ import annotations

import os
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class PemError(ValueError):
    """A file cannot be used. The message has its name, its path and the reason."""


class PemFile:
    """The content of a file when it was read. `name` is its name in messages."""

    def __init__(self, name: str, path: str | os.PathLike[str]) -> None:
        """Read it. Raises PemError."""
        self.name = f"{name} {os.fspath(path)}"
        try:
            self.content = Path(path).read_bytes()
        except OSError as error:
            raise self.unusable(f"cannot be read: {error.strerror}") from error

    def unusable(self, reason: str) -> PemError:
        return PemError(f"{self.name} {reason}")


def load_authorities(context: ssl.SSLContext, file: PemFile) -> None:
    """Make the context trust these certificates. Raises PemError if there is none."""
    text = file.content.decode("ascii", "ignore")  # Comments between them may be in any language.
    try:
        context.load_verify_locations(cadata=text or " ")
    except ssl.SSLError as error:
        raise file.unusable(f"holds no certificate in PEM: {reason_of(error)}") from error


def load_pair(context: ssl.SSLContext, certificate: PemFile, key: PemFile) -> None:
    """Make the context present this certificate. Raises PemError if certificate and key do not fit."""

    def passphrase() -> str:
        raise key.unusable("has a passphrase, which the program cannot ask for")

    # First, because its error is the best if the file has no certificate.
    load_authorities(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), certificate)
    with _as_file(certificate.content) as certificate_path, _as_file(key.content) as key_path:
        try:
            context.load_cert_chain(certificate_path, key_path, passphrase)
        except ssl.SSLError as error:
            if error.reason == "KEY_VALUES_MISMATCH":
                raise key.unusable(f"is not the key of {certificate.name}") from error
            if error.reason is None:  # OpenSSL found no key between the BEGIN and END lines.
                raise key.unusable("holds no private key in PEM") from error
            raise certificate.unusable(f"cannot be used: {reason_of(error)}") from error


def reason_of(error: ssl.SSLError) -> str:
    """OpenSSL's message, without the place in its source."""
    return str(error.args[-1]).partition(" (_ssl.c")[0]


def file_stamps(*paths: str | os.PathLike[str]) -> tuple[object, ...]:
    """Differs after each change of a file, in place, by renaming, or by a changed link to it. Skips empty paths."""
    return tuple(_stamp(path) for path in paths if path)


def _stamp(path: str | os.PathLike[str]) -> tuple[int, ...] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


@contextmanager
def _as_file(content: bytes) -> Iterator[str]:
    """A path to these very bytes: OpenSSL reads pairs from files only, and ours may change between two readings."""
    fd = os.memfd_create("kvservice-tls")
    try:
        with open(fd, "wb", closefd=False) as file:
            file.write(content)
        yield f"/proc/self/fd/{fd}"
    finally:
        os.close(fd)
