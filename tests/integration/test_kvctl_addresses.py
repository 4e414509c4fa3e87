"""``kvctl`` and addresses: wrong ones are wrong usage, and for a daemon that does not answer it gives the remedy."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvservice.config import ConfigError
from kvservice.config_sources import load_settings
from kvservice_api.address import UnixAddress, parse_address
from kvservice_api.errors import InvalidRequest
from kvservice_client import Client
from tests.certificates import Authority
from tests.daemon import DaemonProcess

KVCTL = Path(sys.executable).with_name("kvctl")

NewDaemon = Callable[..., DaemonProcess]
Kvctl = Callable[..., subprocess.CompletedProcess[str]]


def words(text: str) -> str:
    """A usage message without its box and its line breaks."""
    return " ".join(re.sub(r"[│╭╮╰╯─]", " ", text).split())


@pytest.mark.parametrize(
    "address", ["127.0.0.1", "127.0.0.1:99999", "::1:7070", "", "http://127.0.0.1:7070", "h:-5", "kä:1"]
)
@pytest.mark.parametrize("verb", ["status", "bench"])
def test_a_wrong_address_is_wrong_usage_with_the_rule(kvctl_here: Kvctl, verb: str, address: str) -> None:
    if verb == "bench" and not address:
        pytest.skip("without an address bench starts a daemon of its own")
    done = kvctl_here(verb, "--address", address)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Invalid value for '--address'" in words(done.stderr)
    assert "is not an address" in words(done.stderr)
    assert "an address is host:port" in words(done.stderr)
    assert "kvservice serve" not in done.stderr


@pytest.mark.parametrize("address", ["127.0.0.1", "[::1]", "::1:7070", "h:70700", "[::g]:1", "http://h:1", "1.2.3:1"])
def test_client_kvctl_and_daemon_refuse_an_address_with_the_same_words(kvctl_here: Kvctl, address: str) -> None:
    with pytest.raises(InvalidRequest) as by_client:
        Client(address)
    refused, _, rule = by_client.value.message.partition("; ")
    assert refused.startswith(f"'{address}' is not an address: ")
    assert rule.startswith("an address is host:port")
    assert f"{refused}; {rule}" in words(kvctl_here("status", "--address", address).stderr)
    for setting in ("address", "metrics_address"):
        for flags, environ in (
            ([f"--server.{setting}", address], {}),
            ([], {f"KVSERVICE_SERVER__{setting.upper()}": address}),
        ):
            with pytest.raises(ConfigError) as by_daemon:
                load_settings(flags, environ)
            # A daemon may have port 0, so its range of ports differs.
            assert refused.replace("from 1", "from 0") in str(by_daemon.value)
            assert "; an address to listen on is host:port" in str(by_daemon.value)


@pytest.mark.parametrize("path", ["/run/", "unix:", "/run/\n.sock", "/" + "x" * 107], ids=repr)
def test_client_and_daemon_refuse_a_path_with_the_same_words(path: str) -> None:
    with pytest.raises(InvalidRequest) as by_client:
        Client(path)
    with pytest.raises(ConfigError) as by_daemon:
        load_settings(["--server.unix_socket", path], {})
    assert by_client.value.message.partition("; ")[0] in str(by_daemon.value)


def test_client_and_daemon_take_a_path_alike() -> None:
    for text, path in (("unix:kv.sock", "kv.sock"), ("/run/kv.sock", "/run/kv.sock"), ("unix:/kv.sock", "/kv.sock")):
        assert parse_address(text) == UnixAddress(path)
        assert load_settings(["--server.unix_socket", text], {}).unix_socket_path == Path(path)


def test_a_wrong_address_in_the_environment_is_named_by_its_variable(
    kvctl_here: Kvctl, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVCTL_ADDRESS", "127.0.0.1:99999")
    done = kvctl_here("status")
    assert done.returncode == 2
    assert "KVCTL_ADDRESS" in done.stderr
    assert "a port is a number from 1 to 65535" in words(done.stderr)


def test_a_path_with_a_slash_is_a_socket_wherever_it_begins(daemon: DaemonProcess) -> None:
    for address in (
        "store/kvservice.sock",
        "./store/kvservice.sock",
        "unix:store/kvservice.sock",
        str(daemon.socket_path),
    ):
        done = subprocess.run(
            [KVCTL, "health", "--address", address],
            cwd=daemon.folder,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert (done.returncode, done.stdout) == (0, "serving\n"), done.stderr


def test_a_socket_may_have_a_name_that_means_something_in_uris(new_daemon: NewDaemon, tmp_path: Path) -> None:
    path = tmp_path / "kä #1%41?.sock"
    daemon = new_daemon(server__unix_socket=path)
    assert path.is_socket()
    done = subprocess.run([KVCTL, "health", "--address", path], capture_output=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, b"serving\n")
    assert daemon.stop() == 0


_AS_ANOTHER_USER = """
import os, sys
from kvservice_api.address import UnixAddress
from kvservice_client.cli.unreachable import why_unreachable
os.setuid(65534)
print(why_unreachable(UnixAddress(sys.argv[1]), with_tls=False))
"""


class TestWhereNoDaemonAnswers:
    @pytest.fixture
    def hint(self, kvctl_here: Kvctl) -> Callable[..., str]:
        """The end of the last line on standard error, after gRPC's reason."""

        def run(address: object, *options: object) -> str:
            done = kvctl_here("status", "--timeout", "5", "--address", str(address), *map(str, options))
            assert (done.returncode, done.stdout) == (1, "")
            line = done.stderr.splitlines()[-1]
            assert line.startswith("kvctl: ")
            return line

        return run

    def test_it_says_to_start_one_where_nothing_listens(self, hint: Any) -> None:
        with socket.socket() as bound:  # Bound and not listening: refused, and no other process takes the port.
            bound.bind(("127.0.0.1", 0))
            assert "Start a daemon with `kvservice serve --store.path FOLDER`" in hint(
                f"127.0.0.1:{bound.getsockname()[1]}"
            )

    def test_it_says_that_another_program_listens(self, hint: Any, new_daemon: NewDaemon) -> None:
        with socket.socket() as bound:
            bound.bind(("127.0.0.1", 0))
            port = bound.getsockname()[1]
        new_daemon(server__metrics_address=f"127.0.0.1:{port}")
        line = hint(f"127.0.0.1:{port}")
        assert f"The program at 127.0.0.1:{port} does not answer as a KVService daemon: it hangs, or is" in line
        assert line.endswith("If this is a daemon's bulk port, name its gRPC port: by default the number before it.")
        assert "kvservice serve" not in line

    def test_it_says_that_the_host_is_not_known(self, hint: Any) -> None:
        line = hint("host.invalid:7070")
        assert "The host name host.invalid cannot be resolved" in line
        assert "kvservice serve" not in line

    def test_it_says_that_there_is_no_socket(self, hint: Any, tmp_path: Path) -> None:
        assert f"There is no {tmp_path}/none.sock. Start a daemon" in hint(tmp_path / "none.sock")

    def test_it_says_that_the_file_is_no_socket(self, hint: Any, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        assert "is not a socket: correct --address" in hint(tmp_path / "file")

    def test_it_says_that_nothing_listens_on_the_socket_any_more(self, hint: Any, tmp_path: Path) -> None:
        with socket.socket(socket.AF_UNIX) as left:
            left.bind(str(tmp_path / "left.sock"))
        assert "No process listens on the socket any more. Start a daemon" in hint(tmp_path / "left.sock")

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root may become another user")
    def test_it_says_that_the_user_may_not_connect(self, tmp_path: Path) -> None:
        closed = tmp_path / "closed"
        closed.mkdir(mode=0o700)
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(str(closed / "kv.sock"))
            listening.listen()
            done = subprocess.run(
                [sys.executable, "-c", _AS_ANOTHER_USER, closed / "kv.sock"],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
            )
        assert "server.unix_socket_access" in done.stdout, done.stderr
        assert "kvservice serve" not in done.stdout

    def test_it_tells_refused_tls_from_a_refused_connection(
        self, hint: Any, new_daemon: NewDaemon, tmp_path: Path
    ) -> None:
        authority = Authority()
        certificate, key = authority.issue("localhost").write(tmp_path)
        ca = authority.write(tmp_path)
        daemon = new_daemon(tls__certificate=certificate, tls__key=key, tls__client_ca=ca)
        address = f"localhost:{daemon.port}"  # Usually of two addresses, and the daemon listens at one.

        assert f"The program at 127.0.0.1:{daemon.port} uses TLS: give --tls-ca" in hint(address)
        line = hint(address, "--tls-ca", ca)
        assert f"The program at 127.0.0.1:{daemon.port} uses TLS, and one side refused the other" in line
        assert "--tls-certificate" in line
        assert "kvservice serve" not in line

    def test_it_says_that_the_other_side_speaks_no_tls(self, hint: Any, daemon: DaemonProcess, tmp_path: Path) -> None:
        line = hint(daemon.address, "--tls-ca", Authority().write(tmp_path))
        assert "does not use TLS: remove the options --tls-..." in line
