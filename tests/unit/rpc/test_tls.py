"""The daemon's TLS files: which are refused, with which messages, and how changed files are handled."""

from __future__ import annotations

import logging
import re
import shutil
import subprocess
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from kvservice.config import ConfigError
from kvservice.config_sections import TlsSettings
from kvservice.counters import Counters
from kvservice.rpc.tls import Certificates, read_identity
from tests.certificates import Authority, replace

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


@pytest.fixture
def files(tmp_path: Path, authority: Authority) -> TlsSettings:
    certificate, key = authority.issue().write(tmp_path)
    return TlsSettings(certificate=str(certificate), key=str(key), client_ca=str(authority.write(tmp_path)))


def refusal(files: TlsSettings) -> str:
    with pytest.raises(ConfigError) as error:
        read_identity(files)
    return str(error.value)


def test_a_certificate_its_key_and_a_client_ca_are_taken_as_they_are(files: TlsSettings) -> None:
    identity = read_identity(files)

    assert identity.certificate == Path(files.certificate).read_bytes()
    assert identity.key == Path(files.key).read_bytes()
    assert identity.client_ca == Path(files.client_ca).read_bytes()
    assert identity.expires_at_s > datetime.now(UTC).timestamp()


@pytest.mark.parametrize("name", ["certificate", "key", "client_ca"])
class TestEachFile:
    def test_that_is_missing_is_named(self, files: TlsSettings, name: str) -> None:
        Path(getattr(files, name)).unlink()

        assert refusal(files) == f"tls.{name} {getattr(files, name)} cannot be read: No such file or directory"

    def test_that_is_a_folder_is_named(self, files: TlsSettings, name: str) -> None:
        Path(getattr(files, name)).unlink()
        Path(getattr(files, name)).mkdir()

        assert refusal(files) == f"tls.{name} {getattr(files, name)} cannot be read: Is a directory"

    @pytest.mark.parametrize("content", [b"", b"\x00\xff" * 100, b"-----BEGIN CERTIFICATE-----\nAAAA\n"])
    def test_that_holds_something_else_is_named(self, files: TlsSettings, name: str, content: bytes) -> None:
        Path(getattr(files, name)).write_bytes(content)

        assert refusal(files).startswith(f"tls.{name} {getattr(files, name)} holds no ")

    def test_may_carry_comments_in_any_language(self, files: TlsSettings, name: str) -> None:
        path = Path(getattr(files, name))
        path.write_bytes("Für die Küche\n".encode() + path.read_bytes())

        read_identity(files)


def test_a_key_of_another_certificate_is_refused(files: TlsSettings, authority: Authority) -> None:
    Path(files.key).write_bytes(authority.issue().key)

    assert refusal(files) == f"tls.key {files.key} is not the key of tls.certificate {files.certificate}"


def test_a_key_with_a_passphrase_is_refused_without_asking_for_it(
    files: TlsSettings, authority: Authority, tmp_path: Path
) -> None:
    pair = authority.issue()
    pair.write(tmp_path)
    Path(files.key).write_bytes(pair.key_with_passphrase())

    assert "has a passphrase" in refusal(files)


def test_an_expired_certificate_is_refused_with_its_date(
    files: TlsSettings, authority: Authority, tmp_path: Path
) -> None:
    end = datetime(2024, 2, 29, 12, tzinfo=UTC)
    authority.issue(valid_from=end - timedelta(days=1), valid_until=end).write(tmp_path)

    assert refusal(files) == f"tls.certificate {files.certificate} expired on 2024-02-29 12:00:00 UTC"


def test_a_certificate_of_the_future_is_refused_with_its_date(
    files: TlsSettings, authority: Authority, tmp_path: Path
) -> None:
    start = datetime.now(UTC).replace(microsecond=0) + timedelta(hours=1)
    authority.issue(valid_from=start, valid_until=start + timedelta(hours=1)).write(tmp_path)

    assert refusal(files) == f"tls.certificate {files.certificate} is not valid before {start:%Y-%m-%d %H:%M:%S} UTC"


def test_a_client_ca_that_may_sign_nothing_is_refused(files: TlsSettings, authority: Authority) -> None:
    Path(files.client_ca).write_bytes(authority.issue().certificate)

    assert "holds no certificate of a CA" in refusal(files)


def test_an_expired_client_ca_is_refused_unless_another_one_stands_beside_it(
    files: TlsSettings, authority: Authority
) -> None:
    expired = Authority(expired=True).certificate
    Path(files.client_ca).write_bytes(expired)
    assert "expired on" in refusal(files)

    Path(files.client_ca).write_bytes(expired + authority.certificate)
    read_identity(files)


class TestFilesThatChange:
    @pytest.fixture
    def counters(self) -> Counters:
        return Counters()

    @pytest.fixture
    def certificates(self, files: TlsSettings) -> Certificates:
        return Certificates(files)

    def test_are_taken_at_the_next_look(
        self, certificates: Certificates, counters: Counters, authority: Authority, tmp_path: Path
    ) -> None:
        new = authority.issue()
        new.write(tmp_path)

        certificates.look(counters)

        assert (certificates.latest.certificate, certificates.latest.key) == (new.certificate, new.key)
        assert (counters.tls_reloads, counters.tls_reloads_refused) == (1, 0)

    def test_and_hold_the_same_are_no_change(
        self, certificates: Certificates, counters: Counters, files: TlsSettings
    ) -> None:
        before = certificates.latest
        replace(Path(files.certificate), before.certificate)

        certificates.look(counters)

        assert certificates.latest is before
        assert counters.tls_reloads == 0

    def test_and_are_half_written_at_one_look_are_taken_at_the_next_without_a_word(
        self,
        certificates: Certificates,
        counters: Counters,
        authority: Authority,
        files: TlsSettings,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        new = authority.issue()
        replace(Path(files.certificate), new.certificate)
        certificates.look(counters)
        assert certificates.latest.certificate != new.certificate

        replace(Path(files.key), new.key)
        certificates.look(counters)

        assert certificates.latest.certificate == new.certificate
        assert counters.tls_reloads_refused == 0
        assert not [record for record in caplog.records if record.levelno >= logging.WARNING]

    @pytest.mark.parametrize("spoil", [Path.unlink, lambda path: path.write_bytes(b"other")])
    def test_and_stay_unusable_are_refused_once_and_the_former_ones_stay(
        self,
        certificates: Certificates,
        counters: Counters,
        files: TlsSettings,
        spoil: Callable[[Path], object],
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        before = certificates.latest
        spoil(Path(files.key))

        for _ in range(5):
            certificates.look(counters)

        assert certificates.latest is before
        assert counters.tls_reloads_refused == 1
        (line,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
        assert f"tls.key {files.key}" in line.getMessage()

    def test_and_are_not_valid_yet_are_taken_once_they_are(
        self,
        files: TlsSettings,
        counters: Counters,
        authority: Authority,
        tmp_path: Path,
    ) -> None:
        now = datetime.now(UTC)
        certificates = Certificates(files, lambda: now.timestamp())
        start = now + timedelta(hours=1)
        new = authority.issue(valid_from=start, valid_until=start + timedelta(hours=1))
        new.write(tmp_path)
        certificates.look(counters)
        assert certificates.latest.certificate != new.certificate

        now = start + timedelta(seconds=1)
        certificates.look(counters)

        assert certificates.latest.certificate == new.certificate


def test_what_the_commands_in_the_docs_make_is_taken(tmp_path: Path) -> None:
    bash, openssl = shutil.which("bash"), shutil.which("openssl")
    if not (bash and openssl):
        pytest.skip("bash and openssl are needed")
    (commands,) = re.findall(r"```bash\n(openssl (?s:.*?))```", (ROOT / "docs" / "security.md").read_text())

    subprocess.run([bash, "-ec", commands], cwd=tmp_path, check=True, capture_output=True)

    files = (str(tmp_path / name) for name in ("daemon.crt", "daemon.key", "ca.crt"))
    read_identity(TlsSettings(**dict(zip(("certificate", "key", "client_ca"), files, strict=True))))
    strictly = ["verify", "-x509_strict", "-CAfile", "ca.crt", "daemon.crt", "engine.crt"]
    subprocess.run([openssl, *strictly], cwd=tmp_path, check=True, capture_output=True)
