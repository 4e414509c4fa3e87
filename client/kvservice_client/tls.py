"""The client's TLS files: where they are, what they hold, and whether that has changed."""

from __future__ import annotations

import logging
import os
import ssl
from dataclasses import dataclass
from typing import NamedTuple

from kvservice_api.errors import TlsFileUnusable
from kvservice_api.pem_files import PemError, PemFile, file_stamps, load_authorities, load_pair
from kvservice_client.retry import SYSTEM_CLOCK, Clock

log = logging.getLogger(__name__)

_LOOK_EVERY_S = 1.0


@dataclass(frozen=True)
class TlsFiles:
    """How to know the daemon, and how to be known by it. Paths of PEM files; empty ones are not used.

    `ca` holds the authorities that may vouch for the daemon; without it, those that gRPC knows of.
    `certificate` and `key` (without a passphrase) are this client's own, for a daemon that asks for
    them. `server_name` is the name that the daemon's certificate must have, where it is not the address's.

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
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        contents = TlsContents()
        try:
            if self.ca:
                ca = PemFile("the TLS CA", self.ca)
                load_authorities(context, ca)
                contents = contents._replace(ca=ca.content)
            if self.certificate:
                certificate, key = PemFile("the TLS certificate", self.certificate), PemFile("the TLS key", self.key)
                load_pair(context, certificate, key)
                contents = contents._replace(certificate=certificate.content, key=key.content)
        except PemError as error:
            raise TlsFileUnusable(str(error)) from error
        return contents

    def stamps(self) -> tuple[object, ...]:
        """Differs after each change of a file, be it in place, by renaming, or of a link on its way."""
        return file_stamps(self.ca, self.certificate, self.key)


class TlsContents(NamedTuple):
    """PEM, or None for what is not used."""

    ca: bytes | None = None
    certificate: bytes | None = None
    key: bytes | None = None


class TlsWatch:
    """Says what the files hold now, once after each change. For one thread at a time."""

    def __init__(self, files: TlsFiles, clock: Clock = SYSTEM_CLOCK) -> None:
        """Raises TlsFileUnusable."""
        self.files = files
        self._stamps = files.stamps()
        self.latest = files.read()
        self._refused: tuple[object, ...] = ()
        self._clock = clock
        self._next_look_s = clock.now_s() + _LOOK_EVERY_S

    def look_soon(self) -> None:
        """A connection broke: do not wait with the next look."""
        self._next_look_s = 0.0

    def newer(self) -> TlsContents | None:
        """What has replaced `latest`; None where nothing has, or nothing usable. Cheap: it looks once a second."""
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
