"""The client's TLS files: where they are, what they hold, and whether that has changed."""

from __future__ import annotations

import logging
import os
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from kvservice_api.errors import TlsFileUnusable
from kvservice_api.file_stamps import file_stamps
from kvservice_client.retry import SYSTEM_CLOCK, Clock

log = logging.getLogger(__name__)

_LOOK_EVERY_S = 1.0


@dataclass(frozen=True)
class TlsFiles:
    """The client's CA and its own certificate for TLS. Paths of PEM files; empty ones are not used.

    `ca` has the CA certificates that may have signed the daemon's certificate; without it, gRPC's default ones are
    used. `certificate` and `key` (without a passphrase) are this client's own, for a daemon that requires
    them. `server_name` is the name that the daemon's certificate must have, if it is not the address's.

    The files are read again when they change: the connections that are opened after that use them.
    """

    ca: str | os.PathLike[str] = ""
    certificate: str | os.PathLike[str] = ""
    key: str | os.PathLike[str] = ""
    server_name: str = ""

    def read(self) -> TlsContents:
        """Raises TlsFileUnusable, naming file and reason."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        ca = certificate = key = None
        if self.ca:
            ca = _read("CA", self.ca)
            try:
                context.load_verify_locations(self.ca)
            except ssl.SSLError as error:
                raise _unusable("CA", self.ca, "holds no certificate in PEM") from error
            except OSError as error:  # It was removed between the two steps.
                raise _unusable("CA", self.ca, f"cannot be read: {error.strerror}") from error
        if bool(self.certificate) != bool(self.key):
            raise TlsFileUnusable("a TLS certificate and its key go together, and only one of them is given")
        if self.certificate:
            certificate, key = _read("certificate", self.certificate), _read("key", self.key)
            self._check_pair(context)
        return TlsContents(ca, certificate, key)

    def _check_pair(self, context: ssl.SSLContext) -> None:
        def passphrase() -> str:
            raise _unusable("key", self.key, "has a passphrase, which the client cannot ask for")

        try:
            context.load_cert_chain(self.certificate, self.key, passphrase)
        except ssl.SSLError as error:
            if error.reason == "KEY_VALUES_MISMATCH":
                raise _unusable("key", self.key, f"is not the key of the certificate {self.certificate}") from error
            reason = f"and its key {self.key} cannot be used, one of them holds no PEM of its kind"
            raise _unusable("certificate", self.certificate, reason) from error
        except OSError as error:
            raise _unusable("certificate", self.certificate, f"or its key cannot be read: {error.strerror}") from error

    def stamps(self) -> tuple[object, ...]:
        """Differs after each change of a file, in place, by renaming, or by a changed link in its path."""
        return file_stamps(self.ca, self.certificate, self.key)


class TlsContents(NamedTuple):
    """PEM, or None for what is not used."""

    ca: bytes | None
    certificate: bytes | None
    key: bytes | None


class TlsWatch:
    """Returns the contents of the files, once after each change. For one thread at a time."""

    def __init__(self, files: TlsFiles, clock: Clock = SYSTEM_CLOCK) -> None:
        """Raises TlsFileUnusable."""
        self.files = files
        self._stamps = files.stamps()
        self.latest = files.read()
        self._refused: tuple[object, ...] = ()
        self._clock = clock
        self._next_look_s = clock.now_s() + _LOOK_EVERY_S

    def look_soon(self) -> None:
        """A connection broke: check the files at the next call, without the pause."""
        self._next_look_s = 0.0

    def newer(self) -> TlsContents | None:
        """The contents that replace `latest`; None if there is no change, or no usable one. Checks once per second."""
        now_s = self._clock.now_s()
        if now_s < self._next_look_s:
            return None
        self._next_look_s = now_s + _LOOK_EVERY_S
        stamps = self.files.stamps()
        if stamps == self._stamps:
            return None
        try:
            contents = self.files.read()
        except TlsFileUnusable as error:
            if stamps != self._refused:
                self._refused = stamps
                log.warning("changed TLS files refused, the former ones stay in use: %s", error.message)
            return None
        self._stamps = stamps
        if contents == self.latest:
            return None
        self.latest = contents
        return contents


def _read(what: str, path: str | os.PathLike[str]) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise _unusable(what, path, f"cannot be read: {error.strerror}") from error


def _unusable(what: str, path: str | os.PathLike[str], reason: str) -> TlsFileUnusable:
    return TlsFileUnusable(f"the TLS {what} {os.fspath(path)} {reason}")
