"""``kvctl`` as operators run it: one JSON document on stdout, one line on stderr, an exit code."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvservice import __version__
from kvservice_api.copying import implementation
from kvservice_client import BlockChain, Client, Durability, QueuedRequest
from tests import process_starter
from tests.daemon import DaemonProcess, until
from tests.integration.conversations import layers_of, new_chain, small_layout
from tests.process_starter import python_path

KVCTL = Path(sys.executable).with_name("kvctl")


def kvctl(*arguments: str, address: str = "") -> subprocess.CompletedProcess[str]:
    """Its standard input is no terminal."""
    environment = {**os.environ, "KVCTL_ADDRESS": address, "COLUMNS": "80", "PYTHONPATH": python_path()}
    return process_starter.run("tests.kvctl", arguments, environment=environment, timeout=60)


@pytest.fixture
def chain(daemon: DaemonProcess) -> Iterator[BlockChain]:
    """Three blocks in both tiers, and nothing else."""
    layout = small_layout()
    with Client(daemon.address) as client:
        blocks, chain = client.open_layout(layout), new_chain(layout, 3 * layout.block_tokens)
        blocks.save(chain, layers_of(blocks, chain), Durability.SSD)
        yield chain
        client.admin.discard_all()


def test_status_tells_what_is_held(ask: Callable[..., Any], chain: BlockChain) -> None:
    status = ask("status")
    assert (status["state"], status["blocks"], status["clients"], status["ssd"]["blocks"]) == ("serving", 3, 1, 3)
    assert status["dram"]["used_bytes"] > 0
    assert len(status["store_id"]) == 32
    assert status["started_at"].endswith("+00:00")
    assert status["counters"]["save_blocks_stored"] >= 3


def test_the_address_may_stand_before_the_verb(daemon: DaemonProcess) -> None:
    before = kvctl("--address", daemon.address, "health", address="127.0.0.1:1")
    assert (before.returncode, before.stdout) == (0, "serving\n"), before.stderr
    assert kvctl("--address", "127.0.0.1:1", "health", "--address", daemon.address).returncode == 0
    wrong = kvctl("--address", "nowhere", "health")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert "is not an address" in wrong.stderr
    bench = kvctl("--address", "127.0.0.1:1", "bench", "--quick")
    assert bench.returncode == 1
    assert "no answer from the daemon at 127.0.0.1:1" in bench.stderr


@pytest.mark.parametrize("verb", ["plan", "simulate"])
def test_an_address_is_refused_before_a_verb_that_needs_no_daemon(verb: str) -> None:
    done = kvctl("--address", "127.0.0.1:1", verb, "--trace", "people")
    assert (done.returncode, done.stdout) == (2, "")
    assert f"kvctl {verb} needs no daemon" in done.stderr


def test_layouts_and_clients_are_listed(ask: Callable[..., Any], chain: BlockChain, daemon: DaemonProcess) -> None:
    (listed,) = [each for each in ask("layouts")["layouts"] if each["fingerprint"] == small_layout().fingerprint.hex()]
    assert (listed["layout"]["model_id"], listed["blocks"]) == ("small", 3)
    assert listed["size_bytes"] == sum(block["size_bytes"] for block in ask("ls")["blocks"])
    assert ask("layouts", "--limit", "0")["has_more"] is False
    with daemon.client("an engine") as client, client.open_layout(small_layout()).lookup(chain):
        engine = next(each for each in ask("clients")["clients"] if each["name"] == "an engine")
        assert (engine["leases"], engine["leased_blocks"], engine["sends_hints"]) == (1, 3, False)
        hints = client.hints()
        hints.put(QueuedRequest("later", chain))
        until(lambda: "an engine" in [each["name"] for each in ask("clients")["clients"] if each["queued_requests"]])
    assert "an engine" not in [each["name"] for each in ask("clients")["clients"]]


def test_keys_and_layouts_may_be_shortened(kvctl_here: Any, ask: Callable[..., Any], chain: BlockChain) -> None:
    key, layout = chain.keys[1].hex(), small_layout().fingerprint.hex()
    assert ask("inspect", key[:9].upper())["shards"][0]["key"] == ask("inspect", key[:10])["shards"][0]["key"] == key
    assert ask("explain", key[:6])["key"] == key
    assert len(ask("ls", "--layout", layout[:8])["blocks"]) == 3
    assert ask("pin", key[:8], "--ttl", "1min")["pinned"] == ask("unpin", key[:8])["unpinned"] == 1
    assert ask("evict", key[:8], "--tier", "dram")["evicted"] == 1
    nothing = kvctl_here("inspect", "f" * 12)
    assert (nothing.returncode, nothing.stderr.count("no stored block's key begins with ffffffffffff")) == (1, 1)
    unknown = kvctl_here("ls", "--layout", "f" * 12).stderr
    assert "no layout's fingerprint begins with ffffffffffff. See which there are with `kvctl layouts`." in unknown
    assert kvctl_here("inspect", key[:5]).returncode == kvctl_here("evict", "xyzxyz", "--tier", "ssd").returncode == 2
    assert ask("discard", key[:8])["discarded"] == 1


def test_version_tells_both_versions(ask: Callable[..., Any], daemon: DaemonProcess) -> None:
    assert ask("version") == {
        "kvctl": __version__,
        "daemon": __version__,
        "copies": implementation(),
    }
    alone = kvctl("version", address="127.0.0.1:1")
    assert alone.returncode == 0
    assert alone.stdout.startswith(
        f"kvctl {__version__}; copies of shared memory are {implementation()}\nno daemon answers at 127.0.0.1:1. "
    )
    assert kvctl("--version").stdout == f"kvctl {__version__}\n"


def test_ls_and_inspect_tell_of_each_block(ask: Callable[..., Any], chain: BlockChain) -> None:
    listed = ask("ls")
    assert {block["key"] for block in listed["blocks"]} == {key.hex() for key in chain}
    assert not listed["has_more"]
    assert ask("ls", "--limit", "2")["has_more"]
    assert len(ask("ls", "--tier", "ssd", "--layout", small_layout().fingerprint.hex())["blocks"]) == 3
    assert ask("ls", "--layout", "00" * 32)["blocks"] == []

    shown = ask("inspect", chain.keys[1].hex())
    assert shown["layout"]["model_id"] == "small"
    assert [shard["parent_key"] for shard in shown["shards"]] == [chain.keys[0].hex()]
    assert shown["shards"][0]["shard"] == {"layer_begin": 0, "layer_end": 4, "head_begin": 0, "head_end": 2}


def test_evict_drops_from_one_tier_and_discard_from_all(ask: Callable[..., Any], chain: BlockChain) -> None:
    first, second, _ = (key.hex() for key in chain)
    assert ask("evict", first, second, "--tier", "dram") == {"evicted": 2, "held": 0, "missing": 0}
    assert not ask("inspect", first)["shards"][0]["in_dram"]
    assert ask("discard", first, "ab" * 32) == {"discarded": 1, "missing": 1}
    assert ask("discard", "--layout", small_layout().fingerprint.hex(), "--yes") == {"discarded": 2, "missing": 0}
    assert ask("ls")["blocks"] == []


def test_sessions_are_listed_and_warmed(
    ask: Callable[..., Any],
    daemon: DaemonProcess,
    chain: BlockChain,
    kvctl_here: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    layout = small_layout()
    with Client(daemon.address) as client:
        session = client.session(layout, "chat/1")
        session.append(chain)
        session.truncate([(0, 4), (6, 18)], 1)
        client.session(layout, "chat/2").append(chain[:1])
        client.evict(chain.keys[:2], "dram")

    listed = ask("sessions")
    assert [(each["session_id"], each["token_count"]) for each in listed["sessions"]] == [("chat/1", 22), ("chat/2", 8)]
    assert not listed["has_more"]
    first = listed["sessions"][0]
    assert (first["revision"], first["cuts"], first["slice_count"], first["tail_tokens"]) == (2, 1, 4, 0)
    assert first["expires_at"] > first["used_at"] >= first["created_at"]
    assert ask("sessions", "--limit", "1")["has_more"]
    assert len(ask("sessions", "chat/2")["sessions"]) == 1
    assert ask("sessions", "--layout", "00" * 32)["sessions"] == []

    warmed = {"sessions": 1, "blocks": 3, "missing": 0, "in_dram": 1, "promoted": 2, "failed": 0}
    assert ask("warm", "chat/1") == warmed
    assert ask("warm", "chat/1") == {**warmed, "in_dram": 3, "promoted": 0}
    ask("discard", chain.keys[1].hex())
    assert ask("warm", "chat/1") == {**warmed, "in_dram": 2, "promoted": 0, "missing": 1}

    for arguments, expected in (
        (["sessions"], "chat/1   "),
        (["warm", "chat/1"], "promoted 0, 2 were in DRAM, 1 are not stored"),
    ):
        done = kvctl_here(*arguments)
        assert (done.returncode, done.stderr) == (0, "")
        assert expected in done.stdout
    for session_id in ("chat/1", "chat/2"):
        with Client(daemon.address) as client:
            client.session(layout, session_id).end()


def test_discard_takes_as_many_steps_as_there_are_blocks(ask: Callable[..., Any], daemon: DaemonProcess) -> None:
    layout = small_layout("many")
    with Client(daemon.address) as client:
        blocks, chain = client.open_layout(layout), new_chain(layout, 2100 * layout.block_tokens)
        blocks.save(chain, layers_of(blocks, chain))
    assert ask("discard", "--everything", "-y") == {"discarded": 2100, "missing": 0}
    assert ask("status")["blocks"] == 0


def test_scrub_reads_every_copy(ask: Callable[..., Any], chain: BlockChain) -> None:
    scrubbed = ask("scrub")
    assert (scrubbed["blocks_checked"], scrubbed["damaged"], scrubbed["done"]) == (6, 0, True)
    assert ask("scrub", "--tier", "ssd")["blocks_checked"] == 3


def test_scrub_ends_with_1_where_it_found_damage(
    daemon: DaemonProcess, ask: Callable[..., Any], chain: BlockChain
) -> None:
    with Client(daemon.address) as client:
        saved = layers_of(client.open_layout(small_layout()), chain)[0][:64].tobytes()
    [arena] = daemon.shared_memory.glob("kvservice-*/arena")
    with arena.open("r+b") as file:
        file.seek(file.read().index(saved))
        file.write(bytes([saved[0] ^ 1]))

    done = kvctl("scrub", "--json", address=daemon.address)
    assert done.returncode == 1
    assert json.loads(done.stdout)["damaged"] == 1
    assert ask("scrub")["damaged"] == 0


def test_a_misspelled_variable_is_named_and_help_needs_no_dashes(monkeypatch: pytest.MonkeyPatch) -> None:
    done = kvctl("help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "Looks after a KVService daemon" in done.stdout
    monkeypatch.setenv("KVCTL_ADRESS", "127.0.0.1:1")
    done = kvctl("status")
    assert done.returncode == 2
    assert "KVCTL_ADRESS in the environment is no variable of kvctl; the nearest is KVCTL_ADDRESS" in done.stderr


def test_people_get_tables(kvctl_here: Callable[..., subprocess.CompletedProcess[str]], chain: BlockChain) -> None:
    for arguments, expected in (
        (["status"], "3 blocks of"),
        (["ls"], f"{chain.keys[0].hex()}  {small_layout().fingerprint.hex()[:8]}"),
        (["inspect", chain.keys[0].hex()], "4 layers: full, 2 KV heads, 16+16 bfloat16"),
        (["evict", chain.keys[0].hex(), "--tier", "dram"], "evicted 1 from dram"),
        (["scrub"], "checked 5 copies of blocks"),
        (["discard", chain.keys[0].hex()], "discarded 1, 0 were not stored"),
    ):
        done = kvctl_here(*arguments)
        assert (done.returncode, done.stderr) == (0, "")
        assert expected in done.stdout


def test_the_status_says_why_the_daemon_does_not_use_a_gpu(
    daemon: DaemonProcess, kvctl_here: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    with daemon.client() as client:
        why = client.admin.status().cuda.refused_because
    if not why:
        pytest.skip("this host has a GPU")

    assert f"cuda_ipc is not offered: {why[:20]}" in kvctl_here("status").stdout


@pytest.mark.parametrize(
    ("bulk_address", "refused_because"),
    [("", ""), ("127.0.0.2:0", "of 127.0.0.1 cannot be reached"), ("off", "the daemon has no bulk port")],
)
def test_the_status_says_whether_this_client_reaches_the_bulk_port(
    new_daemon: Callable[..., DaemonProcess], bulk_address: str, refused_because: str
) -> None:
    daemon = new_daemon(server__bulk_address=bulk_address)
    port = daemon.wait_for_log("serving")["bulk_port"]

    done = kvctl("status", "--json", address=daemon.address)
    status = json.loads(done.stdout)
    assert (done.returncode, done.stderr, status["bulk_port"]) == (0, "", port)
    assert refused_because in status["bulk_refused_because"] and bool(refused_because) == bool(
        status["bulk_refused_because"]
    )
    shown = kvctl("status", address=daemon.address).stdout
    expected = f"bulk port {port}, " + ("not used from here: the bulk" if refused_because else "reached from here")
    assert (expected if port else "there is no bulk port") in shown
    if port:
        assert "uses a UNIX socket" in kvctl("status", address=str(daemon.socket_path)).stdout


def test_progress_shows_on_a_terminal_only_and_never_in_the_output(daemon: DaemonProcess, chain: BlockChain) -> None:
    ours, theirs = pty.openpty()
    command = [str(KVCTL), "scrub", "--json", "--address", daemon.address]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=theirs, text=True, timeout=60, check=False)
    os.close(theirs)
    assert json.loads(done.stdout)["done"]
    assert b"scrubbing" in os.read(ours, 65536)
    os.close(ours)


@pytest.mark.parametrize(
    ("arguments", "address", "line"),
    [
        (
            ["status"],
            "127.0.0.1:1",
            r"kvctl: no answer from the daemon at 127\.0\.0\.1:1.*kvservice serve.*--address\.\n",
        ),
        (
            ["inspect", "ab" * 32],
            "",
            r"kvctl: nothing is stored under (ab){32}\. See what is stored with `kvctl ls`\.\n",
        ),
        (
            ["warm", "unknown"],
            "",
            r"kvctl: there is no session 'unknown'\. See which there are with `kvctl sessions`\.\n",
        ),
    ],
    ids=["no daemon", "no such block", "no such session"],
)
def test_an_error_is_one_line_that_says_what_to_do(
    daemon: DaemonProcess, arguments: list[str], address: str, line: str
) -> None:
    done = kvctl(*arguments, "--json", address=address or daemon.address)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(line, done.stderr)


@pytest.mark.parametrize(
    "arguments",
    [
        ["inspect", "xyz"],
        ["evict", "ab" * 32],
        ["discard"],
        ["discard", "ab" * 32, "--everything"],
        ["scurb"],
        ["bench", "--write", "/nowhere/page.md"],
    ],
    ids=" ".join,
)
def test_wrong_usage_ends_with_2(
    kvctl_here: Callable[..., subprocess.CompletedProcess[str]], arguments: list[str]
) -> None:
    done = kvctl_here(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Usage: kvctl" in done.stderr


def test_nothing_is_dropped_without_a_yes(daemon: DaemonProcess, ask: Callable[..., Any], chain: BlockChain) -> None:
    done = kvctl("discard", "--everything", address=daemon.address)
    assert done.returncode == 1
    assert len(ask("ls")["blocks"]) == 3


def test_a_verb_whose_packages_are_missing_says_what_to_install(tmp_path: Path) -> None:
    package = tmp_path / "others-1.0.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: others\nVersion: 1.0\n")
    (package / "entry_points.txt").write_text("[kvctl.commands]\nother = not_installed.at_all:run\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    for arguments in (["other", "--json"], ["other"]):
        done = subprocess.run([KVCTL, *arguments], env=environment, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (1, "")
        assert "other cannot run here: No module named 'not_installed'" in done.stderr


def test_on_a_new_store_a_shortened_key_is_not_found(new_daemon: Callable[..., DaemonProcess]) -> None:
    daemon = new_daemon()
    for verb in (("inspect",), ("pin", "--ttl", "1min"), ("explain",)):
        done = kvctl(*verb, "abcdef", address=daemon.address)
        assert (done.returncode, "Traceback" in done.stderr) == (1, False)
        assert "abcdef" in done.stderr
    assert json.loads(kvctl("layouts", "--json", address=daemon.address).stdout)["layouts"] == []
