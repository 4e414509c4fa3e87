"""The client's TLS files: where they are, what they hold, and whether that has changed."""

from __future__ import annotations

import logging
import os
import ssl
from dataclasses import dataclass
from typing import NamedTuple

from kvservice_api.errors import TlsFileUnusable
from kvservice_api.pem_files import PemError, PemFile, file_stamps, load_authorities, load_pair
from kvservice_api.tls_contexts import new_context
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
        if bool(self.certificate) != bool(self.key):
            raise TlsFileUnusable("a TLS certificate and its key go together, and only one of them is given")
        try:
            contents = TlsContents(
                PemFile("the TLS CA", self.ca) if self.ca else None,
                PemFile("the TLS certificate", self.certificate) if self.certificate else None,
                PemFile("the TLS key", self.key) if self.key else None,
            )
            contents.context()
        except PemError as error:
            raise TlsFileUnusable(str(error)) from error
        return contents

    def stamps(self) -> tuple[object, ...]:
        """Differs after each change of a file, in place, by renaming, or by a changed link in its path."""
        return file_stamps(self.ca, self.certificate, self.key)


class TlsContents(NamedTuple):
    """The files when they were read, or None for what is not used."""

    ca: PemFile | None = None
    certificate: PemFile | None = None
    key: PemFile | None = None

    @property
    def pem(self) -> tuple[bytes | None, bytes | None, bytes | None]:
        """CA, key and certificate, in gRPC's order."""
        return _content(self.ca), _content(self.key), _content(self.certificate)

    def context(self) -> ssl.SSLContext:
        """For sockets that are not gRPC's. Without a CA it trusts those of the system. Raises PemError."""
        context = new_context(ssl.PROTOCOL_TLS_CLIENT)
        if self.ca is None:
            context.load_default_certs()
        else:
            load_authorities(context, self.ca)
        if self.certificate is not None and self.key is not None:
            load_pair(context, self.certificate, self.key)
        return context


def _content(file: PemFile | None) -> bytes | None:
    return None if file is None else file.content


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
        if contents.pem == self.latest.pem:
            return None
        self.latest = contents
        return contents
