"""Addresses: one rule for the client, kvctl and the daemon, and a message that says it."""

from __future__ import annotations

import pytest

from kvservice_api.address import Address, TcpAddress, UnixAddress, parse_address, parse_listen_address
from kvservice_api.errors import InvalidRequest
from kvservice_client import Client

NO_ADDRESSES: list[object] = [
    "",
    " ",
    "127.0.0.1",
    "localhost",
    "kvservice.sock",
    "127.0.0.1:",
    "127.0.0.1:0",
    "127.0.0.1:65536",
    "127.0.0.1:99999",
    "127.0.0.1:-5",
    "127.0.0.1:+5",
    "127.0.0.1:7_0",
    "127.0.0.1:70 ",
    " 127.0.0.1:70",
    "127.0.0.1:70\n",
    "127.0.0.1:٧٠",  # Digits, but of another script.
    "127.0.0.1:7070:7070",
    "127.0.0.1:7070/",
    "127.0.0.1:7070/status",
    "127.0.0.1:http",
    "256.0.0.1:7070",
    "1.2.3:7070",
    ":7070",
    "::1:7070",
    "::1",
    "[::1]",
    "[::1]7070",
    "[::g]:7070",
    "[127.0.0.1]:7070",
    "[]:7070",
    "kä.example:7070",
    "a b:7070",
    "a..b:7070",
    "-a:7070",
    f"{'a' * 64}:7070",
    "*:7070",
    "user@host:7070",
    "http://127.0.0.1:7070",
    "https://kv.example.org",
    "grpc://127.0.0.1:7070",
    "dns:///kv.example.org:7070",
    "unix:",
    "unix-abstract:kv",
    "/",
    "/run/",
    "./",
    "/run/kv\0.sock",
    "/run/kv\n.sock",
    "/" + "x" * 107,
    None,
    7070,
    7070.5,
    b"127.0.0.1:7070",
    ("127.0.0.1", 7070),
    ["127.0.0.1:7070"],
]


@pytest.mark.parametrize(
    ("text", "address", "target"),
    [
        ("127.0.0.1:7070", TcpAddress("127.0.0.1", 7070), "127.0.0.1:7070"),
        ("localhost:1", TcpAddress("localhost", 1), "localhost:1"),
        ("kv-1.example.org:65535", TcpAddress("kv-1.example.org", 65535), "kv-1.example.org:65535"),
        ("kv_1.default.svc.:7070", TcpAddress("kv_1.default.svc.", 7070), "kv_1.default.svc.:7070"),
        ("[::1]:7070", TcpAddress("::1", 7070), "[::1]:7070"),
        ("[fe80::1%eth0]:7070", TcpAddress("fe80::1%eth0", 7070), "[fe80::1%eth0]:7070"),
        ("/run/kv.sock", UnixAddress("/run/kv.sock"), "unix:/run/kv.sock"),
        ("s2/kvservice.sock", UnixAddress("s2/kvservice.sock"), "unix:s2/kvservice.sock"),
        ("./kvservice.sock", UnixAddress("./kvservice.sock"), "unix:./kvservice.sock"),
        ("../a/kv.sock", UnixAddress("../a/kv.sock"), "unix:../a/kv.sock"),
        ("unix:kvservice.sock", UnixAddress("kvservice.sock"), "unix:kvservice.sock"),
        ("unix:/run/kv.sock", UnixAddress("/run/kv.sock"), "unix:/run/kv.sock"),
        ("/run/a b/kä#1%.sock", UnixAddress("/run/a b/kä#1%.sock"), "unix:/run/a%20b/k%C3%A4%231%25.sock"),
        ("./127.0.0.1:7070", UnixAddress("./127.0.0.1:7070"), "unix:./127.0.0.1%3A7070"),
    ],
)
def test_an_address_is_host_and_port_or_the_path_of_a_socket(text: str, address: Address, target: str) -> None:
    assert parse_address(text) == address
    assert parse_address(text).target == target


@pytest.mark.parametrize("text", NO_ADDRESSES, ids=repr)
def test_whatever_else_is_refused_with_the_rule_and_examples(text: object) -> None:
    with pytest.raises(ValueError, match=r"is not an address: .*host:port .*\[::1\]:7070.*UNIX socket"):
        parse_address(text)


@pytest.mark.parametrize("text", NO_ADDRESSES, ids=repr)
def test_a_client_refuses_it_when_it_is_made(text: object) -> None:
    with pytest.raises(InvalidRequest, match=r"is not an address: .*host:port") as refused:
        Client(text)  # type: ignore[arg-type]
    assert refused.value.details["field"] == "address"


def test_a_daemon_may_leave_its_port_to_the_system_and_has_its_socket_elsewhere() -> None:
    assert parse_listen_address("[::]:0") == TcpAddress("::", 0)
    for text in ("127.0.0.1", "127.0.0.1:65536", "/run/kv.sock", "unix:kv.sock", "", None):
        with pytest.raises(ValueError, match=r"is not an address: .*0\.0\.0\.0:7070"):
            parse_listen_address(text)


@pytest.mark.parametrize(
    ("host", "is_loopback"),
    [("127.8.9.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False), ("kv.local", False)],
)
def test_which_hosts_only_this_host_can_reach(host: str, is_loopback: bool) -> None:
    assert TcpAddress(host, 7070).is_loopback is is_loopback


def test_a_long_one_is_cut_in_the_message() -> None:
    with pytest.raises(ValueError, match=r"^'x{90,}\.\.\. is not an address") as refused:
        parse_address("x" * 10_000)
    assert len(str(refused.value)) < 500
