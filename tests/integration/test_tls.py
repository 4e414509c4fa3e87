"""TLS between real processes: access per certificate, rotation, and no unencrypted byte outside of loopback."""

from __future__ import annotations

import json
import os
import re
import socket
import ssl
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from cryptography import x509

from kvservice_api.errors import DaemonUnavailable, TlsFileUnusable
from kvservice_client import Client, Durability, Tier, TlsFiles
from tests.certificates import Authority, Pair, replace
from tests.daemon import DaemonProcess, until
from tests.integration.conversations import large_layout, layers_of, new_chain, same, small_layout

KVCTL = Path(sys.executable).with_name("kvctl")
GONE_WRONG = r"no answer from the daemon at 127.0.0.1:\d+"


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


@pytest.fixture(scope="module")
def stranger() -> Authority:
    """A CA that neither the daemon nor the client trusts."""
    return Authority("another CA")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "tls"
    path.mkdir()
    return path


@contextmanager
def daemon_with(
    folder: Path, pair: Pair, *, client_ca: bytes | None = None, **settings: Any
) -> Iterator[DaemonProcess]:
    """A daemon that serves TLS with this pair, whose files are ``daemon.pem`` and ``daemon.key``."""
    certificate, key = pair.write(folder)
    settings |= {"tls__certificate": certificate, "tls__key": key}
    if client_ca is not None:
        settings["tls__client_ca"] = replace(folder / "clients.pem", client_ca)
    with DaemonProcess(folder.parent, **settings) as daemon:
        yield daemon


def files_of(folder: Path, authority: Authority, pair: Pair | None = None, name: str = "client") -> TlsFiles:
    """A client's files: the CA that it trusts, and its own certificate."""
    ca = authority.write(folder, f"{name}-ca")
    return TlsFiles(ca, *pair.write(folder, name)) if pair else TlsFiles(ca)


def serial_shown(port: int) -> int:
    """The number of the certificate that the daemon shows to a new client."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    with socket.create_connection(("127.0.0.1", port)) as plain, context.wrap_socket(plain) as encrypted:
        shown = encrypted.getpeercert(binary_form=True)
    assert shown
    return x509.load_der_x509_certificate(shown).serial_number


class TestTheDaemonsCertificate:
    def test_vouched_for_by_the_ca_lets_a_client_save_and_load(self, folder: Path, authority: Authority) -> None:
        layout = small_layout()
        with (
            daemon_with(folder, authority.issue()) as daemon,
            daemon.client(tls=files_of(folder, authority)) as client,
        ):
            blocks, chain = client.open_layout(layout), new_chain(layout, 3 * layout.block_tokens)
            layers = layers_of(blocks, chain)
            assert blocks.save(chain, layers).stored == 3
            with blocks.lookup(chain) as lease:
                assert same([layer.data for layer in lease.load()], layers)

    def test_of_another_ca_is_refused_by_the_client(
        self, folder: Path, authority: Authority, stranger: Authority
    ) -> None:
        with (
            daemon_with(folder, stranger.issue()) as daemon,
            daemon.client(tls=files_of(folder, authority)) as client,
            pytest.raises(DaemonUnavailable, match=f"{GONE_WRONG}.*CERTIFICATE_VERIFY_FAILED"),
        ):
            client.capabilities()

    def test_of_another_name_is_refused_unless_the_client_expects_that_name(
        self, folder: Path, authority: Authority
    ) -> None:
        files = files_of(folder, authority)
        with daemon_with(folder, authority.issue(host="kv.example.com")) as daemon:
            address = f"localhost:{daemon.port}"
            with Client(address, tls=files) as client, pytest.raises(DaemonUnavailable, match="localhost"):
                client.capabilities()
            with Client(address, tls=TlsFiles(files.ca, server_name="kv.example.com")) as client:
                assert client.capabilities().version

    def test_that_expires_while_the_daemon_runs_is_refused_by_clients_until_it_is_replaced(
        self, folder: Path, authority: Authority
    ) -> None:
        files, end = files_of(folder, authority), datetime.now(UTC) + timedelta(seconds=8)
        with daemon_with(folder, authority.issue(valid_until=end)) as daemon:
            until(lambda: datetime.now(UTC) > end)
            with daemon.client(tls=files) as client:
                with pytest.raises(DaemonUnavailable, match="certificate has expired"):
                    client.capabilities()

                authority.issue().write(folder)
                daemon.wait_for_log("TLS files changed")
                assert client.capabilities().version

    def test_is_not_asked_for_on_the_unix_socket(self, folder: Path, authority: Authority) -> None:
        with daemon_with(folder, authority.issue()) as daemon:
            for tls in (None, files_of(folder, authority)):
                with Client(str(daemon.socket_path), tls=tls) as client:
                    assert client.capabilities().version


class TestRotation:
    def test_reaches_new_handshakes_while_leases_and_running_loads_live_on(
        self, folder: Path, authority: Authority
    ) -> None:
        first, second, layout = authority.issue(), authority.issue(), large_layout()
        with (
            daemon_with(folder, first, dram__capacity_bytes="128MiB") as daemon,
            daemon.client(tls=files_of(folder, authority)) as client,
        ):
            blocks, chain = client.open_layout(layout), new_chain(layout, 5 * layout.block_tokens)
            layers = layers_of(blocks, chain)  # 60 MiB: far more than what is under way at one time.
            blocks.save(chain, layers, timeout_s=30)
            assert serial_shown(daemon.port) == first.serial_number
            lease = blocks.lookup(chain, lease_ttl_s=60)
            load = lease.load(timeout_s=60)
            loaded = [next(load).data.copy()]

            second.write(folder)
            daemon.wait_for_log("TLS files changed")

            assert serial_shown(daemon.port) == second.serial_number
            loaded += [layer.data.copy() for layer in load]
            assert same(loaded, layers)
            lease.renew()
            assert client.admin.status().counters["tls_reloads"] == 1

    def test_to_another_ca_works_once_clients_trust_both(
        self, folder: Path, authority: Authority, stranger: Authority
    ) -> None:
        files = files_of(folder, authority)
        with daemon_with(folder, authority.issue()) as daemon, daemon.client(tls=files) as client:
            assert client.capabilities().version
            replace(Path(files.ca), authority.certificate + stranger.certificate)
            stranger.issue().write(folder)
            daemon.wait_for_log("TLS files changed")

            daemon.kill()
            daemon.start()

            until(lambda: works(client))

    def test_to_unusable_files_is_refused_logged_and_counted_and_the_old_files_stay_in_use(
        self, folder: Path, authority: Authority
    ) -> None:
        first, expired, good = authority.issue(), authority.issue(expired=True), authority.issue()
        with (
            daemon_with(folder, first, server__metrics_address="127.0.0.1:0") as daemon,
            daemon.client(tls=files_of(folder, authority)) as client,
        ):
            expired.write(folder)
            line = daemon.wait_for_log("changed TLS files refused, the former ones stay in use")
            assert re.fullmatch(rf".*: tls.certificate {folder}/daemon.pem expired on .* UTC", line["event"])
            assert serial_shown(daemon.port) == first.serial_number
            assert client.admin.status().counters["tls_reloads_refused"] == 1
            assert 'kvservice_tls_reloads_total{result="refused"} 1.0' in scraped(daemon, authority)

            good.write(folder)
            daemon.wait_for_log("TLS files changed")
            assert serial_shown(daemon.port) == good.serial_number


def works(client: Client) -> bool:
    try:
        client.capabilities()
    except DaemonUnavailable:
        return False
    return True


class TestClientCertificates:
    """Mutual TLS: `tls.client_ca` is set."""

    @pytest.fixture
    def daemon(self, folder: Path, authority: Authority) -> Iterator[DaemonProcess]:
        with daemon_with(
            folder, authority.issue(), client_ca=authority.certificate, server__metrics_address="127.0.0.1:0"
        ) as daemon:
            yield daemon

    def test_of_the_client_ca_get_in(self, daemon: DaemonProcess, folder: Path, authority: Authority) -> None:
        with daemon.client(tls=files_of(folder, authority, authority.issue("client"))) as client:
            assert client.capabilities().version

    def test_that_are_missing_of_another_ca_or_expired_keep_out(
        self, daemon: DaemonProcess, folder: Path, authority: Authority, stranger: Authority
    ) -> None:
        for pair in (None, stranger.issue("client"), authority.issue("client", expired=True)):
            with (
                daemon.client(tls=files_of(folder, authority, pair)) as client,
                pytest.raises(DaemonUnavailable, match=GONE_WRONG),
            ):
                client.capabilities()

    def test_are_asked_for_by_the_metrics_too(self, daemon: DaemonProcess, folder: Path, authority: Authority) -> None:
        with pytest.raises((OSError, urllib.error.URLError)):
            scraped(daemon, authority)

        assert "kvservice_blocks 0.0" in scraped(daemon, authority, authority.issue("prometheus").write(folder, "p"))

    def test_are_read_again_when_the_client_reconnects(
        self,
        daemon: DaemonProcess,
        folder: Path,
        authority: Authority,
        stranger: Authority,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """The daemon changes to another client CA: after a restart, only the client's new files have access."""
        monkeypatch.setattr("kvservice_client.tls._LOOK_EVERY_S", 3600.0)  # Not because a time has passed.
        files = files_of(folder, authority, authority.issue("client"))
        with daemon.client(tls=files) as client:
            assert client.capabilities().version
            replace(folder / "clients.pem", stranger.certificate)
            daemon.wait_for_log("TLS files changed")
            stranger.issue("client").write(folder, "client")

            daemon.kill()
            daemon.start()

            until(lambda: works(client))

    def test_that_changed_serve_new_calls_while_running_ones_keep_their_connection(
        self, daemon: DaemonProcess, folder: Path, authority: Authority
    ) -> None:
        layout = small_layout()
        with daemon.client(tls=files_of(folder, authority, authority.issue("client"))) as client:
            blocks, chain = client.open_layout(layout), new_chain(layout, layout.block_tokens)
            blocks.save(chain, layers_of(blocks, chain))
            lease = blocks.lookup(chain)  # It belongs to the attachment's stream, which stays open.
            (before,) = connections_to(daemon)

            authority.issue("client").write(folder, "client")
            until(lambda: works(client) and len(connections_to(daemon)) == 2)

            assert before in connections_to(daemon)
            lease.renew()
            assert client.admin.status().clients == 1
        until(lambda: not connections_to(daemon))

    def test_that_changed_close_the_former_connection_with_the_last_call_on_it(
        self, daemon: DaemonProcess, folder: Path, authority: Authority
    ) -> None:
        layout, files = small_layout(), files_of(folder, authority, authority.issue("client"))
        with daemon.client(tls=files) as other:
            blocks, chain = other.open_layout(layout), new_chain(layout, 100 * layout.block_tokens)
            blocks.save(chain, layers_of(blocks, chain))
        until(lambda: not connections_to(daemon))
        with daemon.client(tls=files) as client:
            scrub = client.admin.scrub(Tier.DRAM, bytes_per_second=8192)  # A minute, one block of 4 KiB after another.
            next(scrub)
            (before,) = connections_to(daemon)
            authority.issue("client").write(folder, "client")
            until(lambda: works(client) and len(connections_to(daemon)) == 2)
            assert before in connections_to(daemon)

            del scrub  # Cancels it.

            until(lambda: before not in connections_to(daemon))
            assert works(client)

    def test_that_changed_leave_no_connection_behind_on_which_nothing_runs(
        self, daemon: DaemonProcess, folder: Path, authority: Authority
    ) -> None:
        with daemon.client(tls=files_of(folder, authority, authority.issue("client"))) as client:
            client.capabilities()
            (before,) = connections_to(daemon)

            authority.issue("client").write(folder, "client")

            until(lambda: works(client) and not {before} & connections_to(daemon))
            assert len(connections_to(daemon)) == 1

    def test_that_changed_and_cannot_be_used_are_passed_over(
        self, daemon: DaemonProcess, folder: Path, authority: Authority, caplog: pytest.LogCaptureFixture
    ) -> None:
        with daemon.client(tls=files_of(folder, authority, authority.issue("client"))) as client:
            client.capabilities()
            before = connections_to(daemon)

            replace(folder / "client.key", authority.issue().key)

            until(lambda: works(client) and "is not the key of the TLS certificate" in caplog.text)
            assert connections_to(daemon) == before


def connections_to(daemon: DaemonProcess) -> set[int]:
    """The local ports of this process's connections to the daemon."""
    return {
        each.laddr.port
        for each in psutil.Process().net_connections("tcp")
        if each.raddr and each.raddr.port == daemon.port and each.status == psutil.CONN_ESTABLISHED
    }


class TestAClientsFiles:
    @pytest.mark.parametrize("name", ["ca", "certificate", "key"])
    def test_that_cannot_be_used_are_an_error_before_anything_is_sent(
        self, folder: Path, authority: Authority, name: str
    ) -> None:
        files = files_of(folder, authority, authority.issue("client"))
        path = Path(getattr(files, name))
        for content, reason in ((b"nothing", "PEM"), (None, "cannot be read: No such file or directory")):
            path.write_bytes(content) if content else path.unlink()
            with pytest.raises(TlsFileUnusable, match=f"{path} .*{reason}"):
                Client("127.0.0.1:1", tls=files)

    def test_that_lack_one_of_a_pair_are_an_error(self, folder: Path, authority: Authority) -> None:
        certificate, _ = authority.issue().write(folder)
        with pytest.raises(TlsFileUnusable, match="go together"):
            Client("127.0.0.1:1", tls=TlsFiles(certificate=certificate))

    def test_whose_key_has_a_passphrase_are_an_error(self, folder: Path, authority: Authority) -> None:
        pair = authority.issue("client")
        files = files_of(folder, authority, pair)
        Path(files.key).write_bytes(pair.key_with_passphrase())
        with pytest.raises(TlsFileUnusable, match="has a passphrase"):
            Client("127.0.0.1:1", tls=files)


def own_address() -> str:
    """An address of this machine that others can reach; loopback where it has none."""
    for addresses in psutil.net_if_addrs().values():
        for each in addresses:
            if each.family == socket.AF_INET and not each.address.startswith("127."):
                return str(each.address)
    return "127.0.0.1"


PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])  # And empty SETTINGS.
A_TLS_ALERT_OR_NOTHING = re.compile(rb"(\x15\x03.\x00\x02..)?", re.DOTALL)


@pytest.fixture(scope="module")
def open_daemon(tmp_path_factory: pytest.TempPathFactory, authority: Authority) -> Iterator[DaemonProcess]:
    """A daemon that other hosts can reach."""
    folder = tmp_path_factory.mktemp("open") / "tls"
    folder.mkdir()
    address = "0.0.0.0:0"
    with daemon_with(folder, authority.issue(), server__address=address, server__metrics_address=address) as daemon:
        yield daemon


class TestOffLoopback:
    @pytest.mark.parametrize("port_name", ["port", "metrics_port"])
    @pytest.mark.parametrize(
        "sent",
        [
            pytest.param(PREFACE, id="HTTP/2"),
            pytest.param(b"GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n", id="HTTP/1"),
            pytest.param(b"\x00" * 4096, id="zeros"),
            pytest.param(b"", id="silence", marks=pytest.mark.slow),  # Disconnected after ten seconds.
        ],
    )
    def test_no_plain_byte_is_answered(self, open_daemon: DaemonProcess, port_name: str, sent: bytes) -> None:
        port = open_daemon.logged("serving")[0][port_name]
        with socket.create_connection((own_address(), port), timeout=20) as connection:
            connection.sendall(sent)
            received = b""
            try:
                while some := connection.recv(65536):
                    received += some
            except ConnectionError:
                pass

        assert A_TLS_ALERT_OR_NOTHING.fullmatch(received)

    def test_failed_handshakes_write_nothing_into_the_daemon_s_log(self, folder: Path, authority: Authority) -> None:
        certificate, key = authority.issue().write(folder)
        daemon = DaemonProcess(folder.parent, tls__certificate=certificate, tls__key=key)
        try:
            daemon.start(environment={"GRPC_ENABLE_FORK_SUPPORT": "0"})  # gRPC reads such variables at its import.
            for sent in (PREFACE, b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x00\x05hello"):
                with socket.create_connection(("127.0.0.1", daemon.port), timeout=20) as connection:
                    connection.sendall(sent)
                    with suppress(ConnectionError):
                        while connection.recv(65536):
                            pass
            assert daemon.stop() == 0
            assert not [line for line in daemon.lines if not line.startswith("{")]
        finally:
            daemon.remove()

    def test_a_plain_grpc_client_gets_no_answer_and_one_with_tls_does(
        self, open_daemon: DaemonProcess, folder: Path, authority: Authority
    ) -> None:
        address = f"{own_address()}:{open_daemon.port}"
        with grpc.insecure_channel(address) as channel, pytest.raises(grpc.RpcError) as error:
            channel.unary_unary("/kvservice_api.v1.AdminService/Status", None, None)(b"", timeout=10)
        assert error.value.code() == grpc.StatusCode.UNAVAILABLE
        files = TlsFiles(files_of(folder, authority).ca, server_name="localhost")
        with Client(address, tls=files) as client:
            assert client.capabilities().version

    def test_metrics_are_served_while_other_clients_say_nothing(
        self, open_daemon: DaemonProcess, authority: Authority
    ) -> None:
        port = open_daemon.logged("serving")[0]["metrics_port"]
        with ExitStack() as silent:  # So many that, one after another, their timeouts would exceed the test's.
            for _ in range(5):
                silent.enter_context(socket.create_connection(("127.0.0.1", port)))
            assert "kvservice_tls_certificate_expires_seconds" in scraped(open_daemon, authority)


@pytest.mark.parametrize("setting", ["server.address", "server.metrics_address"])
@pytest.mark.parametrize("insecure", [(), ("--insecure",)])
def test_off_loopback_without_tls_the_daemon_starts_only_with_the_insecure_setting(
    tmp_path: Path, setting: str, insecure: tuple[str, ...]
) -> None:
    daemon = DaemonProcess(tmp_path)
    daemon.settings[setting] = "0.0.0.0:0"
    daemon.launch(more_flags=insecure)
    try:
        assert daemon.serves() == bool(insecure)
        if not insecure:
            assert daemon.wait_for_end() == 2
            assert f"{setting} 0.0.0.0:0 can be reached from other hosts" in "".join(daemon.lines)
            assert not daemon.store.exists()
    finally:
        daemon.remove()


class TestAtStart:
    def test_files_that_cannot_be_used_are_named_before_anything_is_opened(
        self, folder: Path, authority: Authority
    ) -> None:
        certificate, key = authority.issue(expired=True).write(folder)
        daemon = DaemonProcess(folder.parent, tls__certificate=certificate, tls__key=key)
        daemon.launch()
        try:
            assert daemon.wait_for_end() == 2
            (line,) = daemon.lines
            assert re.fullmatch(rf"kvservice serve: tls.certificate {certificate} expired on .* UTC\n", line)
            assert not daemon.store.exists()
        finally:
            daemon.remove()


def test_no_file_of_a_store_or_an_arena_can_be_read_by_other_users(new_daemon: Callable[..., DaemonProcess]) -> None:
    daemon, layout = new_daemon(), small_layout()
    with daemon.client() as client:
        blocks, chain = client.open_layout(layout), new_chain(layout, layout.block_tokens)
        blocks.save(chain, layers_of(blocks, chain), Durability.SSD)

    files = [path for folder in (daemon.store, daemon.shared_memory) for path in folder.rglob("*") if path.is_file()]
    readable = {path.name for path in files if path.stat().st_mode & 0o077}

    assert readable == {"lock"}  # The process id of the daemon.
    assert len(files) >= 4


class TestTheUnixSocket:
    @pytest.mark.parametrize(("access", "mode"), [("user", 0o600), ("group", 0o660), ("all", 0o666)])
    def test_has_the_mode_that_its_setting_names(
        self, new_daemon: Callable[..., DaemonProcess], access: str, mode: int
    ) -> None:
        daemon = new_daemon(server__unix_socket_access=access)

        assert daemon.socket_path.stat().st_mode & 0o777 == mode

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
    @pytest.mark.parametrize("access", ["user", "all"])
    def test_lets_other_users_in_only_where_the_setting_says_so(
        self, new_daemon: Callable[..., DaemonProcess], access: str
    ) -> None:
        daemon = new_daemon(server__unix_socket_access=access)
        become_other_user = "import os, socket; os.setgroups([]); os.setgid(65534); os.setuid(65534)"
        connect = "socket.socket(socket.AF_UNIX).connect('kvservice.sock'); print('connected')"

        done = subprocess.run(
            [sys.executable, "-c", f"{become_other_user}; {connect}"],
            cwd=daemon.store,  # The folders above belong to pytest, which gives other users no access.
            capture_output=True,
            text=True,
            check=False,
        )

        assert ("connected" in done.stdout) == (access == "all"), done.stderr
        assert ("PermissionError" in done.stderr) == (access == "user")


@pytest.fixture(scope="module")
def strict_daemon(tmp_path_factory: pytest.TempPathFactory, authority: Authority) -> Iterator[DaemonProcess]:
    """A daemon that asks for client certificates."""
    folder = tmp_path_factory.mktemp("strict") / "tls"
    folder.mkdir()
    with daemon_with(folder, authority.issue(), client_ca=authority.certificate) as daemon:
        yield daemon


class TestKvctl:
    def test_takes_options(self, strict_daemon: DaemonProcess, folder: Path, authority: Authority) -> None:
        files = files_of(folder, authority, authority.issue("operator"))
        options = ["--tls-ca", files.ca, "--tls-certificate", files.certificate, "--tls-key", files.key]

        done = kvctl("status", "--json", "--address", strict_daemon.address, *options)
        assert (done.returncode, json.loads(done.stdout)["state"]) == (0, "serving")
        done = kvctl("status", "--address", strict_daemon.address, *options, "--tls-server-name", "elsewhere")
        assert done.returncode == 1
        assert "Hostname Verification Check failed" in done.stderr

    def test_takes_environment_variables(
        self, strict_daemon: DaemonProcess, folder: Path, authority: Authority
    ) -> None:
        files = files_of(folder, authority, authority.issue("operator"))
        environment = {
            "KVCTL_ADDRESS": strict_daemon.address,
            "KVCTL_TLS_CA": str(files.ca),
            "KVCTL_TLS_CERTIFICATE": str(files.certificate),
            "KVCTL_TLS_KEY": str(files.key),
        }

        assert kvctl("ls", environment=environment).returncode == 0

    def test_says_which_file_is_wrong_and_what_to_do(self, strict_daemon: DaemonProcess, folder: Path) -> None:
        done = kvctl("ls", "--address", strict_daemon.address, "--tls-ca", folder / "none.pem")

        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr == (
            f"kvctl: the TLS CA {folder}/none.pem cannot be read: No such file or directory. "
            "Correct the file, or name another one; see `kvctl COMMAND --help`.\n"
        )

    def test_without_options_says_that_tls_may_be_missing(self, strict_daemon: DaemonProcess) -> None:
        done = kvctl("ls", "--address", strict_daemon.address)

        assert (done.returncode, done.stdout) == (1, "")
        assert "uses TLS: give --tls-ca" in done.stderr

    def test_with_a_wrong_ca_says_so(self, strict_daemon: DaemonProcess, folder: Path, stranger: Authority) -> None:
        done = kvctl("ls", "--address", strict_daemon.address, "--tls-ca", stranger.write(folder, "stranger"))

        assert (done.returncode, done.stdout) == (1, "")
        line = done.stderr.splitlines()[-1]  # Above it are gRPC's own.
        assert line.startswith("kvctl: ")
        assert "CERTIFICATE_VERIFY_FAILED" in line


def kvctl(*arguments: object, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [KVCTL, *map(str, arguments)],
        env={**os.environ, **(environment or {})},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def scraped(daemon: DaemonProcess, authority: Authority, own: tuple[Path, Path] | None = None) -> str:
    """The metrics, as Prometheus reads them."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata=authority.certificate.decode())
    if own is not None:
        context.load_cert_chain(*own)
    address = f"https://localhost:{daemon.logged('serving')[0]['metrics_port']}/metrics"
    with urllib.request.urlopen(address, timeout=20, context=context) as answer:
        return str(answer.read().decode())
