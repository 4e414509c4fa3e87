"""``kvctl top``, ``pin``, ``unpin``, ``drain`` and ``explain`` as operators run them."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from threading import Thread
from typing import Any

import pytest

from kvservice_api.v1 import admin_pb2
from kvservice_client import BlockChain, Client, Durability, Outcome, RequestReport, Tier
from kvservice_client.cli import reasons
from tests.daemon import DaemonProcess, until
from tests.integration.known_blocks import SMALL, compare, new_chain, save
from tests.integration.test_client_kvctl import KVCTL, kvctl
from tests.integration.wire import Feed, Upload, Wire

ABSENT = "ab" * 32


def started(*arguments: str, stdout: int = subprocess.PIPE) -> subprocess.Popen[str]:
    """A running ``kvctl`` that a SIGINT interrupts, even if the tests themselves run in the background."""

    def heed_interrupts() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    command = [str(KVCTL), *arguments]
    return subprocess.Popen(command, stdout=stdout, stderr=subprocess.PIPE, text=True, preexec_fn=heed_interrupts)


@pytest.fixture
def client(daemon: DaemonProcess) -> Iterator[Client]:
    with daemon.client("engine") as made:
        yield made


@pytest.fixture
def chain(client: Client) -> BlockChain:
    """Three blocks in both tiers."""
    chain = new_chain(SMALL, 3)
    save(client, SMALL, chain, Durability.SSD)
    return chain


def test_pin_and_unpin_say_what_they_did(ask: Callable[..., Any], daemon: DaemonProcess, chain: BlockChain) -> None:
    first, second, third = (key.hex() for key in chain)
    pinned = ask("pin", first, second, "--ttl", "2h")
    assert (pinned["pinned"], pinned["missing"]) == (2, 0)
    assert ask("explain", first)["shards"][0]["block"]["pinned_until"] == pinned["pinned_until"]
    assert ask("evict", first, third, "--tier", "ssd") == {"evicted": 1, "held": 1, "missing": 0}
    assert ask("unpin", first, third, ABSENT) == {"unpinned": 1, "not_pinned": 1, "missing": 1}

    done = kvctl("pin", second, ABSENT, "--ttl", "1.5min", address=daemon.address)
    assert (done.returncode, done.stderr) == (1, ""), "not all of them could be pinned"
    assert re.match(
        r"pinned 1 until \d{4}-\d\d-\d\d \d\d:\d\d:\d\d \S+, 1 were not stored\nall pins take 16 KiB of", done.stdout
    )
    done = kvctl("inspect", second, address=daemon.address)
    assert "pinned until" in done.stdout
    done = kvctl("unpin", second, address=daemon.address)
    assert done.stdout == "unpinned 1, 0 were not pinned, 0 were not stored\n"


@pytest.mark.parametrize(
    ("ttl", "code", "message"),
    [
        ("5x", 2, "not a duration such as 90s"),
        ("", 2, "not a duration"),
        ("-3s", 2, "not a duration"),
        ("99999999d", 2, "not a duration"),
        ("0s", 1, "must last more than 0 s, and at most 2592000 s. Correct what was given"),
        ("31d", 1, "must last more than 0 s, and at most 2592000 s"),
    ],
)
def test_an_odd_time_to_live_is_refused(
    kvctl_here: Callable[..., subprocess.CompletedProcess[str]], chain: BlockChain, ttl: str, code: int, message: str
) -> None:
    done = kvctl_here("pin", chain.keys[0].hex(), f"--ttl={ttl}", "--json")
    assert (done.returncode, done.stdout) == (code, "")
    assert message in " ".join(done.stderr.replace("│", " ").split())


@pytest.mark.parametrize(
    "arguments",
    [["pin", "xyz", "--ttl", "1h"], ["pin", ABSENT], ["pin", "--ttl", "1h"], ["unpin"], ["unpin", "ab"], ["explain"],
     ["explain", ""], ["top", "--interval", "0"], ["drain", "now"]],
    ids=" ".join,
)  # fmt: skip
def test_wrong_usage_ends_with_2(
    kvctl_here: Callable[..., subprocess.CompletedProcess[str]], arguments: list[str]
) -> None:
    done = kvctl_here(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Usage: kvctl" in done.stderr


def test_pins_past_their_share_are_refused_in_one_line(new_daemon: Callable[..., DaemonProcess]) -> None:
    daemon = new_daemon(pins__fraction_max=0)
    with daemon.client() as client:
        chain = new_chain(SMALL)
        save(client, SMALL, chain, Durability.SSD)
    done = kvctl("pin", chain.keys[0].hex(), "--ttl", "1h", "--json", address=daemon.address)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(
        r"kvctl: pinned blocks would take .*may take 0\. Unpin others .*pins\.fraction_max`\.\n", done.stderr
    )


def test_explain_tells_of_a_block(
    ask: Callable[..., Any], daemon: DaemonProcess, client: Client, chain: BlockChain
) -> None:
    key = chain.keys[0].hex()
    with client.open_layout(SMALL).lookup(chain[:1]):
        pass
    client.evict(chain, Tier.DRAM)
    stored = ask("explain", key.upper())
    assert stored["miss"] is None
    (shard,) = stored["shards"]
    assert [(place["tier"], place["arrival"]) for place in shard["places"]] == [("ssd", "written_behind")]
    assert [(event["kind"], event["tier"]) for event in stored["events"]] == [("evicted_on_request", "dram")]
    done = kvctl("explain", key, address=daemon.address)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(r"on ssd since .*, written behind", done.stdout)
    assert re.search(r"before: evicted from dram at .* on request", done.stdout)
    assert ", 1 hit\n" in done.stdout

    client.admin.discard(chain)
    gone = ask("explain", key)
    assert (gone["miss"]["reason"], gone["miss"]["event"]["kind"]) == ("discarded", "discarded")
    assert gone["shards"] == []
    done = kvctl("explain", key, address=daemon.address)
    assert re.search(r"not stored: discarded at .* on request", done.stdout)
    assert kvctl("explain", key[:12], address=daemon.address).stdout == done.stdout
    done = kvctl("explain", ABSENT, address=daemon.address)
    assert "not stored: never stored here since" in done.stdout


def test_explain_tells_what_a_block_is_worth_and_what_got_its_space(new_daemon: Callable[..., DaemonProcess]) -> None:
    daemon = new_daemon(mover__policy="fifo", dram__capacity_bytes=8 * 2**20, index__volatile_map_bytes=2**20)
    with daemon.client() as client:
        first = new_chain(SMALL, 3)
        save(client, SMALL, first, Durability.SSD)
        while not client.admin.explain_block(first.keys[2]).events:
            save(client, SMALL, new_chain(SMALL, 16), Durability.SSD)
        block = client.admin.explain_block(first.keys[2])
        assert {each.tier_name: each.inputs["size_bytes"] > 0 for each in block.worth.values} == {
            "dram": True,
            "ssd": True,
        }
        event = block.events[0]
        assert (event.tier_name, event.detail, event.last_copy) == ("dram", "fifo", False)
        assert event.space_for in (admin_pb2.SPACE_FOR_SAVE, admin_pb2.SPACE_FOR_FREE_SHARE)
        assert event.HasField("score")
    done = kvctl("explain", first.keys[2].hex(), address=daemon.address)
    assert (done.returncode, done.stderr) == (0, "")
    text = " ".join(done.stdout.split())
    known = r"what the policy fifo knows of its conversation or prefix: \S+ KiB, \S+ \w*B of it in dram, .*used once"
    assert re.search(rf"{known}, .* in dram it has the score \d+: the lowest scores leave first on ssd it has", text)
    assert re.search(r"before: evicted from dram at .* by the policy fifo for .* \(its score was 1, the lowest\)", text)


def test_what_foresight_knows_is_said_in_words_with_units() -> None:
    inputs = {
        "size_bytes": 2.0**21,
        "dram_bytes": 2.0**20,
        "ssd_bytes": 2.0**21,
        "uses": 3.0,
        "idle_s": 90.0,
        "in_use": 0.0,
        "requests_before_it": 4.0,
        "hinted_s_ago": 2.0,
        "returns_per_s": 0.01,
        "value": 1.0,
        "least_score_kept": 2.5e-10,
        "of_a_newer_daemon": 7.0,
    }
    value = admin_pb2.TierWorth(tier_name="dram", score=3.25e-9, inputs=inputs)
    assert list(reasons.worth(admin_pb2.PolicyWorth(policy="foresight", values=[value]))) == [
        "what the policy foresight knows of its conversation or prefix: 2 MiB, 1 MiB of it in dram, 2 MiB of it on "
        "ssd, used 3 times, the last time 1.5 min ago, not in use now, queued behind 4 requests, announced by a hint "
        "2.0 s ago, its next use is expected in about 1.7 min, a use has the weight 1",
        "  in dram it has the score 3.25e-09: the lowest scores leave first",
        "    the lowest that stay have about 2.5e-10",
        "    of_a_newer_daemon 7",
    ]


def test_policy_shows_and_switches(ask: Callable[..., Any], daemon: DaemonProcess, chain: BlockChain) -> None:
    shown = ask("policy")
    assert (shown["policy"], shown["configured"], shown["shadow"]) == ("foresight", "foresight", None)
    assert shown["blocks"] >= 3
    shown = ask("policy", "s3fifo", "--shadow", "lookahead")
    assert (shown["policy"], shown["configured"], shown["shadow"]["policy"]) == ("s3fifo", "foresight", "lookahead")
    done = kvctl("policy", address=daemon.address)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.match(
        r"policy s3fifo, since .*\n  the configuration says foresight \(mover\.policy\): a restart begins with that\n"
        r"  knows \d+ items of \d+ blocks; queued requests read 0\n"
        r"  its last ranking took \S+ ms, its last look \S+ ms\n"
        r"  read ahead on a guess: 0 B, 0% of the blocks left DRAM unused\nshadow lookahead, since .*: \d+ requests\n",
        done.stdout,
    )
    assert re.search(r"all in dram .*\n  s3fifo .*\n  lookahead, modelled ", done.stdout)
    for wrong in (["belady"], ["--shadow", "belady"], ["none"]):
        done = kvctl("policy", *wrong, address=daemon.address)
        assert (done.returncode, done.stdout) == (1, "")
        assert re.fullmatch(
            r"kvctl: no policy is called '\w+': choose among lru, fifo, s3fifo, lookahead, foresight(, none)?\. .*\n",
            done.stderr,
        )
    assert ask("policy", "foresight", "--shadow", "none")["shadow"] is None


def test_explain_tells_of_a_request(
    ask: Callable[..., Any], daemon: DaemonProcess, client: Client, chain: BlockChain
) -> None:
    client.admin.discard(chain.keys[2:])
    with client.open_layout(SMALL).lookup(chain, request_id="cmpl-7[x]") as lease:
        compare(lease, SMALL, chain)
    (lookup,) = ask("explain", "cmpl-7[x]")["lookups"]
    assert (lookup["asked_blocks"], lookup["hit_blocks"], lookup["miss"]["reason"]) == (3, 2, "discarded")
    done = kvctl("explain", "cmpl-7[x]", address=daemon.address)
    assert "request cmpl-7[x]\n" in done.stdout
    assert "2 of 3 blocks were stored: 2 in dram, 0 on ssd only" in done.stdout
    assert re.search(
        r"load of 2 blocks, 5 layers: done, in place in .* ms, 2 blocks from dram, 0 from ssd", done.stdout
    )
    assert re.search(
        rf"the rest was a miss, for block {chain.keys[2].hex()}:\n +discarded at .* on request", done.stdout
    )

    with client.open_layout(SMALL).lookup(chain, request_id=ABSENT):
        pass
    assert ask("explain", ABSENT)["miss"]["reason"] == "never_stored", "it looks like a key"
    assert ask("explain", ABSENT, "--request")["request_id"] == ABSENT

    done = kvctl("explain", ABSENT[:63], "--json", address=daemon.address)
    assert (done.returncode, done.stdout) == (1, "")
    assert f"no block whose key begins with {ABSENT[:63]} is stored or remembered, no request" in done.stderr
    assert done.stderr.endswith("See what is stored with `kvctl ls`.\n")

    done = kvctl("explain", ABSENT[:5], "--json", address=daemon.address)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r"kvctl: no request with the id .* Of a block's key, at least the first 6 .*\.\n", done.stderr)


def test_explain_tells_what_the_engine_reported(
    ask: Callable[..., Any], daemon: DaemonProcess, client: Client, chain: BlockChain
) -> None:
    with client.open_layout(SMALL).lookup(chain, request_id="cmpl-8"):
        pass
    client.report_request(
        RequestReport(
            request_id="cmpl-8",
            outcome=Outcome.FAILED_OVER,
            outcome_reason="DEADLINE_EXCEEDED",
            plan="mixed",
            plan_reason="the first [512] tokens are computed while the rest comes in",
            estimate_s={"load": 0.9, "mixed": 0.6},
            history_tokens=1000,
            new_tokens=40,
            loaded_tokens=488,
            computed_tokens=512,
            loaded_bytes=2**20,
            tier="dram",
            transport="shm",
            lookup_s=0.001,
            waited_s=0.25,
            first_token_s=0.85,
        )
    )
    until(lambda: len(ask("explain", "cmpl-8")["reports"]) == 1)
    told = ask("explain", "cmpl-8")
    assert len(told["lookups"]) == 1
    (explained,) = told["reports"]
    assert explained["report"]["estimates"] == {"load_ms": 900, "recompute_ms": None, "mixed_ms": 600}
    done = kvctl("explain", "cmpl-8", address=daemon.address)
    assert "the load failed, the history was computed instead: DEADLINE_EXCEEDED" in done.stdout
    assert "the first [512] tokens are computed while the rest comes in" in done.stdout
    assert "history of 1000 tokens: 488 loaded (1 MiB from dram by shm), 512 computed; 40 new tokens" in done.stdout
    rows = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert {"load 900.0 ms", "recompute -", "mixed 600.0 ms 850.0 ms"} <= set(rows)
    assert "lookup 1.0 ms, waited 250.0 ms\n" in done.stdout


def test_explain_tells_how_much_of_a_session_is_stored(
    ask: Callable[..., Any], daemon: DaemonProcess, client: Client, chain: BlockChain
) -> None:
    client.session(SMALL, "chat/7").append(chain)
    (whole,) = ask("explain", "chat/7")["sessions"]
    assert (whole["usable_slices"], whole["usable_tokens"], whole["miss"]) == (3, 3 * SMALL.block_tokens, None)
    client.admin.discard(chain.keys[1:2])

    (cut,) = ask("explain", "chat/7", "--session")["sessions"]
    assert (cut["usable_slices"], cut["miss"]["reason"], cut["miss"]["key"]) == (1, "discarded", chain.keys[1].hex())
    done = kvctl("explain", "chat/7", address=daemon.address)
    assert re.search(r"session chat/7\nlayout .*, revision 1, \d+ tokens in 3 slices, expires at .*", done.stdout)
    assert f"  {SMALL.block_tokens} tokens of it can be used: 1 slices, 1 in dram, 0 on ssd only\n" in done.stdout
    assert re.search(rf"missing, block {chain.keys[1].hex()}:\n +discarded at .* on request", done.stdout)

    client.session(SMALL, "chat/7").end()
    gone = kvctl("explain", "chat/7", "--session", address=daemon.address)
    assert gone.returncode == 1 and "it was ended at" in gone.stderr
    both = kvctl("explain", "chat/7", "--session", "--request", address=daemon.address)
    assert both.returncode == 2 and "give one of --request and --session" in both.stderr


@pytest.fixture
def undrained(client: Client) -> Iterator[None]:
    """An empty store that takes saves, before and after."""
    client.admin.discard_all()
    yield
    client.admin.undo_drain()


@pytest.mark.usefixtures("undrained")
def test_drain_and_back(ask: Callable[..., Any], daemon: DaemonProcess, client: Client) -> None:
    save(client, SMALL, new_chain(SMALL, 3))
    drained = ask("drain")
    assert (drained["done"], drained["blocks_only_in_dram"]) == (True, 0)
    assert ask("status")["state"] == "draining"
    assert ask("top", "--count", "1", "--interval", "0.05")["state"] == "draining"
    done = kvctl("drain", address=daemon.address)
    assert (done.returncode, done.stdout) == (0, "drained: everything is on SSD; 0 loads run\n")
    assert kvctl("drain", "--undo", address=daemon.address).stdout == "the daemon accepts saves again\n"
    assert ask("status")["state"] == "serving"


def test_drain_ends_with_1_where_only_dram_holds_blocks(new_daemon: Callable[..., DaemonProcess]) -> None:
    daemon = new_daemon(ssd__capacity_bytes=0)
    with daemon.client() as client:
        save(client, SMALL, new_chain(SMALL, 2))
    done = kvctl("drain", address=daemon.address)
    assert done.returncode == 1
    assert done.stdout.startswith("drained, but 2 blocks (32 KiB) are only in DRAM")


@pytest.mark.usefixtures("undrained")
def test_a_drain_continues_when_kvctl_is_interrupted(ask: Callable[..., Any], daemon: DaemonProcess) -> None:
    with Wire(daemon.address) as wire:
        wire.attach()
        wire.open_layout(SMALL)
        upload = Upload.of(wire, SMALL, new_chain(SMALL))
        feed = Feed(*upload.messages()[:2])
        saving = wire.begin_save(feed)
        until(lambda: wire.status().uploads == 1)
        watching = started("drain", "--address", daemon.address)
        until(lambda: wire.status().state == "draining")
        watching.send_signal(signal.SIGINT)
        out, err = watching.communicate(timeout=60)
        assert (watching.returncode, out) == (130, "")
        assert "continues to drain" in err
        feed.send(*upload.messages()[2:])
        feed.end()
        assert saving.result(timeout=60).stored == 1, "what ran may end"
        assert ask("drain")["done"]


def test_top_prints_one_object_per_sample(daemon: DaemonProcess, client: Client, chain: BlockChain) -> None:
    done = kvctl("top", "--json", "--count", "3", "--interval", "0.1", address=daemon.address)
    assert (done.returncode, done.stderr) == (0, "")
    looks = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(looks) == 3
    for look in looks:
        assert look["state"] == "serving"
        assert look["blocks"] >= 3
        assert look["ssd"]["used_bytes"] >= 3 * 16 * 1024
        assert look["hit_ratio"] is None
        assert look["per_second"]["load_bytes"] == 0
        assert 0 <= look["event_loop_delay_ms"] <= look["event_loop_delay_ms_max"]


def test_top_shows_people_a_picture(daemon: DaemonProcess, chain: BlockChain) -> None:
    done = kvctl("top", "--count", "2", "--interval", "0.1", address=daemon.address)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("kvservice 0") == 1, "only the last screen, because there is no terminal"
    for part in ("serving", "hit ratio", "evicted from dram", "loads", "ssd"):
        assert part in done.stdout


def test_top_on_a_terminal_outlives_a_restart_of_the_daemon(new_daemon: Callable[..., DaemonProcess]) -> None:
    daemon, (ours, theirs) = new_daemon(), pty.openpty()
    seen = bytearray()

    def read() -> None:
        with suppress(OSError):  # The terminal is closed.
            while some := os.read(ours, 65536):
                seen.extend(some)

    def shows_again(word: bytes) -> None:
        seen.clear()
        until(lambda: word in seen)

    arguments = ["top", "--interval", "0.1", "--timeout", "1", "--address", daemon.address]
    reader = Thread(target=read)
    with started(*arguments, stdout=theirs) as watching:
        reader.start()
        try:
            shows_again(b"serving")
            daemon.kill()
            shows_again(b"no answer from the daemon")
            daemon.start()
            shows_again(b"serving")
            watching.send_signal(signal.SIGINT)
            _, err = watching.communicate(timeout=60)
            assert (watching.returncode, err) == (0, "")
        finally:
            watching.kill()
            os.close(theirs)
            reader.join()
            os.close(ours)


def test_top_without_a_daemon_is_an_error(daemon: DaemonProcess) -> None:
    for way in ([], ["--json"]):
        done = kvctl("top", *way, "--count", "1", address="127.0.0.1:1")
        assert (done.returncode, done.stdout) == (1, "")
        assert "no answer from the daemon" in done.stderr


def test_top_ends_quietly_when_it_is_interrupted(daemon: DaemonProcess) -> None:
    with started("top", "--json", "--interval", "0.05", "--address", daemon.address) as watching:
        assert watching.stdout is not None
        assert json.loads(watching.stdout.readline())["state"] == "serving"
        watching.send_signal(signal.SIGINT)
        _, err = watching.communicate(timeout=60)
    assert (watching.returncode, err) == (0, "")
