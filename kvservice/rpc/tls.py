"""TLS: the certificate, key and client CA that handshakes use, from files that may change meanwhile.

They are read at the start, and again when a check, once per second, finds that they have changed. New
contents are used only after a handshake with them has worked; until then the old ones stay in use. gRPC asks
for the latest before each handshake, on threads of its own; the metrics server takes their `context`.
"""

from __future__ import annotations

import asyncio
import logging
import os
import ssl
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

import grpc

from kvservice.config import ConfigError, TlsSettings
from kvservice.counters import Counters
from kvservice_api.file_stamps import file_stamps

log = logging.getLogger(__name__)

_LOOK_EVERY_S = 1.0
_NO_CHECK_TIME = 0x200000  # X509_V_FLAG_NO_CHECK_TIME: we compare times ourselves, to say which one has passed.

Stamps = tuple[object, ...]


@dataclass(frozen=True, slots=True)
class Identity:
    """The files' contents at one time, tested by a handshake. PEM; `client_ca` is empty if clients need no
    certificate."""

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

    def __init__(self, files: TlsSettings) -> None:
        """Read the files. Raises ConfigError, naming setting, file and reason."""
        self._files = files
        self._stamps = file_stamps(files.certificate, files.key, files.client_ca)
        self.latest = read_identity(files)
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

    async def watch(self, counters: Counters) -> NoReturn:
        """Check the files until cancelled. The checks run on a thread, because the files may be on a slow disk."""
        while True:
            await asyncio.sleep(_LOOK_EVERY_S)
            await asyncio.to_thread(self.look, counters)

    def look(self, counters: Counters) -> None:
        """Take the files' contents if they changed and can be used.

        Unusable contents are read again at each check. They are refused, and counted, once two checks found the
        same contents: at the first check, a program may still be writing the files.
        """
        stamps = file_stamps(self._files.certificate, self._files.key, self._files.client_ca)
        if stamps == self._stamps:
            return
        try:
            identity = read_identity(self._files)
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


def read_identity(files: TlsSettings) -> Identity:
    """The files' contents, once they are known to work. Raises ConfigError, naming setting, file and reason."""
    certificate, key = _read(files, "certificate"), _read(files, "key")
    client_ca = _read(files, "client_ca") if files.client_ca else b""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trust = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # A client that trusts just this certificate.
    trust.check_hostname = False
    trust.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN | ssl.VerifyFlags(_NO_CHECK_TIME)
    _trust(trust, files, "certificate", certificate)
    _load_pair(context, files, certificate, key)
    try:
        seen = _shown_in_handshake(context, trust)
    except ssl.SSLError as error:
        raise _unusable(files, "certificate", f"cannot be used: {_reason(error)}") from error
    _check_time(files, "certificate", [seen])
    if files.client_ca:
        _require_client_certificates(context, files, client_ca)
    return Identity(certificate, key, client_ca, _time_s(seen, "notAfter"), context)


def _read(files: TlsSettings, name: str) -> bytes:
    try:
        return Path(getattr(files, name)).read_bytes()
    except OSError as error:
        raise _unusable(files, name, f"cannot be read: {error.strerror}") from error


def _trust(context: ssl.SSLContext, files: TlsSettings, name: str, certificates: bytes) -> None:
    text = certificates.decode("ascii", "ignore")  # Comments between them may be in any language.
    try:
        context.load_verify_locations(cadata=text or " ")
    except ssl.SSLError as error:
        raise _unusable(files, name, f"holds no certificate in PEM: {_reason(error)}") from error


def _load_pair(context: ssl.SSLContext, files: TlsSettings, certificate: bytes, key: bytes) -> None:
    def passphrase() -> str:
        raise _unusable(files, "key", "has a passphrase, which the daemon cannot ask for")

    with _as_file(certificate) as certificate_path, _as_file(key) as key_path:
        try:
            context.load_cert_chain(certificate_path, key_path, passphrase)
        except ssl.SSLError as error:
            if error.reason == "KEY_VALUES_MISMATCH":
                reason = f"is not the key of tls.certificate {files.certificate}"
                raise _unusable(files, "key", reason) from error
            if error.reason is None:  # OpenSSL found no key between the BEGIN and END lines.
                raise _unusable(files, "key", "holds no private key in PEM") from error
            raise _unusable(files, "certificate", f"cannot be used: {_reason(error)}") from error


def _require_client_certificates(context: ssl.SSLContext, files: TlsSettings, client_ca: bytes) -> None:
    context.verify_mode = ssl.CERT_REQUIRED
    _trust(context, files, "client_ca", client_ca)
    authorities = context.get_ca_certs()
    if not authorities:
        raise _unusable(files, "client_ca", "holds no certificate of a CA, one that may sign others")
    _check_time(files, "client_ca", authorities)


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


def _check_time(files: TlsSettings, name: str, certificates: Sequence[Mapping[str, object]]) -> None:
    """Raises ConfigError where none of them is valid now."""
    now_s = time.time()  # Use the real wall clock, as clients do: the store's clock is start time plus monotonic time.
    latest = max(certificates, key=lambda each: _time_s(each, "notAfter"))
    if (end_s := _time_s(latest, "notAfter")) <= now_s:
        raise _unusable(files, name, f"expired on {_written(end_s)}")
    start_s = min(_time_s(each, "notBefore") for each in certificates)
    if start_s > now_s:
        raise _unusable(files, name, f"is not valid before {_written(start_s)}")


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


def _unusable(files: TlsSettings, name: str, reason: str) -> ConfigError:
    return ConfigError(f"tls.{name} {getattr(files, name)} {reason}")


def _reason(error: ssl.SSLError) -> str:
    return str(error.args[-1]).partition(" (_ssl.c")[0]


def _time_s(certificate: Mapping[str, object], name: str) -> float:
    return ssl.cert_time_to_seconds(str(certificate[name]))


def _written(time_s: float) -> str:
    return f"{datetime.fromtimestamp(time_s, UTC):%Y-%m-%d %H:%M:%S} UTC"
