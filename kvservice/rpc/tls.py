"""TLS: the certificate, key and client CA that handshakes use, from files that may change meanwhile.

They are read at the start, and again when a check, once per second, finds that they have changed. New
contents are used only after a handshake with them has worked; until then the old ones stay in use. gRPC asks
for the latest before each handshake, on threads of its own; the metrics server takes their `context`.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, NoReturn

import grpc

from kvservice.clock import Clock
from kvservice.config import ConfigError
from kvservice.config_sections import TlsSettings
from kvservice.counters import Counters
from kvservice_api.pem_files import PemError, PemFile, file_stamps, load_authorities, load_pair, reason_of

log = logging.getLogger(__name__)

_LOOK_EVERY_S = 1.0
_NO_CHECK_TIME = 0x200000  # X509_V_FLAG_NO_CHECK_TIME: we compare times ourselves, to say which one has passed.

Stamps = tuple[object, ...]


@dataclass(frozen=True, slots=True)
class Identity:
    """The files' contents at one time, tested by a handshake. PEM; `client_ca` is empty if clients need no
    certificate.
    """

    certificate: bytes
    key: bytes
    client_ca: bytes
    expires_at_s: float  # Of the certificate, since the epoch.
    context: ssl.SSLContext

    @property
    def configuration(self) -> grpc.ServerCertificateConfiguration:
        pairs = [(self.key, self.certificate)]
        return grpc.ssl_server_certificate_configuration(pairs, self.client_ca or None)


class Certificates:
    """The latest usable state of the files that the settings name."""

    def __init__(self, files: TlsSettings, wall_s: Callable[[], float] = time.time) -> None:
        """Read the files. Raises ConfigError, naming setting, file and reason.

        `wall_s` returns the real wall time in seconds since the epoch, as clients use it. A `Clock` is not used,
        because it keeps the wall time of its start, by which certificates could expire at a wrong time.
        """
        self._files = files
        self._wall_s = wall_s
        self._stamps = file_stamps(files.certificate, files.key, files.client_ca)
        self.latest = read_identity(files, wall_s)
        self._doubt: tuple[Stamps, str] | None = None
        self._has_told = False

    def server_credentials(self) -> grpc.ServerCredentials:
        """Credentials for one port, because gRPC remembers the last contents per port."""
        given = self.latest

        def newer() -> Any:  # grpc's type hints do not allow None, which means: no new contents.
            nonlocal given
            if given is self.latest:
                return None
            given = self.latest
            return given.configuration

        return grpc.dynamic_ssl_server_credentials(
            given.configuration, newer, require_client_authentication=bool(self._files.client_ca)
        )

    async def watch(self, counters: Counters, clock: Clock) -> NoReturn:
        """Check the files until cancelled. The checks run on a thread, because the files may be on a slow disk."""
        while True:
            await clock.sleep(_LOOK_EVERY_S)
            await asyncio.to_thread(self.look, counters)

    def look(self, counters: Counters) -> None:
        """Use the files' contents if they changed and are valid.

        Unusable contents are read again at each check. They are refused, and counted, once two checks found the
        same contents: at the first check, a program may still be writing the files.
        """
        stamps = file_stamps(self._files.certificate, self._files.key, self._files.client_ca)
        if stamps == self._stamps:
            return
        try:
            identity = read_identity(self._files, self._wall_s)
        except ConfigError as error:
            self._refuse((stamps, str(error)), counters)
            return
        self._stamps, self._doubt = stamps, None
        former, now = self.latest, identity
        if (former.certificate, former.key, former.client_ca) == (now.certificate, now.key, now.client_ca):
            return
        self.latest = identity
        counters.tls_reloads += 1
        log.info("TLS files changed: the certificate expires on %s", _written(identity.expires_at_s))

    def _refuse(self, doubt: tuple[Stamps, str], counters: Counters) -> None:
        if doubt != self._doubt:
            self._doubt, self._has_told = doubt, False
        elif not self._has_told:
            self._has_told = True
            counters.tls_reloads_refused += 1
            log.warning("changed TLS files refused, the former ones stay in use: %s", doubt[1])


def read_identity(files: TlsSettings, wall_s: Callable[[], float] = time.time) -> Identity:
    """The files' contents, tested at the time that `wall_s` returns, in seconds since the epoch.

    Raises ConfigError, naming setting, file and reason.
    """
    try:
        certificate, key = PemFile("tls.certificate", files.certificate), PemFile("tls.key", files.key)
        client_ca = PemFile("tls.client_ca", files.client_ca) if files.client_ca else None
        return _identity(certificate, key, client_ca, wall_s())
    except PemError as error:
        raise ConfigError(str(error)) from error


def _identity(certificate: PemFile, key: PemFile, client_ca: PemFile | None, now_s: float) -> Identity:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.num_tickets = 0  # To resume sessions: they would make a bulk connection that is new and idle look ended.
    load_pair(context, certificate, key)
    trust = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # A client that trusts just this certificate.
    trust.check_hostname = False
    trust.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN | ssl.VerifyFlags(_NO_CHECK_TIME)
    load_authorities(trust, certificate)
    try:
        seen = _shown_in_handshake(context, trust)
    except ssl.SSLError as error:
        raise certificate.unusable(f"cannot be used: {reason_of(error)}") from error
    _check_time(certificate, [seen], now_s)
    if client_ca is not None:
        _require_client_certificates(context, client_ca, now_s)
    authorities = client_ca.content if client_ca is not None else b""
    return Identity(certificate.content, key.content, authorities, _time_s(seen, "notAfter"), context)


def _require_client_certificates(context: ssl.SSLContext, client_ca: PemFile, now_s: float) -> None:
    context.verify_mode = ssl.CERT_REQUIRED
    load_authorities(context, client_ca)
    authorities = context.get_ca_certs()
    if not authorities:
        raise client_ca.unusable("holds no certificate of a CA, one that may sign others")
    _check_time(client_ca, authorities, now_s)


def _shown_in_handshake(server: ssl.SSLContext, client: ssl.SSLContext) -> Mapping[str, object]:
    """The server's certificate as the client has verified it: a whole handshake, in memory."""
    upwards, downwards = ssl.MemoryBIO(), ssl.MemoryBIO()
    asking = client.wrap_bio(downwards, upwards)
    unfinished = [asking, server.wrap_bio(upwards, downwards, server_side=True)]
    while unfinished:
        for side in list(unfinished):
            try:
                side.do_handshake()
                unfinished.remove(side)
            except ssl.SSLWantReadError:
                pass
    return asking.getpeercert() or {}


def _check_time(file: PemFile, certificates: Sequence[Mapping[str, object]], now_s: float) -> None:
    """Raises PemError if none of them is valid now."""
    latest = max(certificates, key=lambda each: _time_s(each, "notAfter"))
    if (end_s := _time_s(latest, "notAfter")) <= now_s:
        raise file.unusable(f"expired on {_written(end_s)}")
    start_s = min(_time_s(each, "notBefore") for each in certificates)
    if start_s > now_s:
        raise file.unusable(f"is not valid before {_written(start_s)}")


def _time_s(certificate: Mapping[str, object], name: str) -> float:
    return ssl.cert_time_to_seconds(str(certificate[name]))


def _written(time_s: float) -> str:
    return f"{datetime.fromtimestamp(time_s, UTC):%Y-%m-%d %H:%M:%S} UTC"
