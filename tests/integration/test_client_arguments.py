"""A caller's mistakes: InvalidRequest at once, with the rule, whether or not there is a daemon."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest

from kvservice_api.errors import InvalidRequest
from kvservice_client import Client, Layout, RequestReport, Shard, block_chain
from tests.daemon import DaemonProcess
from tests.integration.known_blocks import SMALL, layers_of, new_chain, save

NO_SPANS = [-1.0, -1e-9, math.nan, math.inf, -math.inf, 1e10, "5", b"5", True, [1.0], np.ones(2)]
NO_SESSION_IDS = ["", " ", "user 17", "käse", "a\n", "a\0", "a" * 201, "a,b", "ａ", 17, None, b"chat", ["chat"]]


@pytest.fixture
def client(daemon: DaemonProcess) -> Iterator[Client]:
    with daemon.client() as client:
        yield client


@pytest.fixture
def away() -> Iterator[Client]:
    """A client of a daemon that is not there: a call would raise DaemonUnavailable."""
    with Client("127.0.0.1:1") as client:
        yield client


def refused(call: Callable[[], object], *words: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        call()
    for word in words:
        assert word in raised.value.message


@pytest.mark.parametrize("session_id", NO_SESSION_IDS, ids=repr)
def test_a_session_id_that_breaks_the_rule_is_refused_with_the_rule(
    client: Client, away: Client, session_id: Any
) -> None:
    rule = "a session id has 1 to 200 letters, digits and -_.:@/+=~, all of them ASCII"
    refused(lambda: away.session(SMALL, session_id), "session_id", rule)
    refused(lambda: away.session(SMALL, "chat").fork(session_id), "new_session_id", rule)


def test_the_daemon_has_the_same_rule(client: Client) -> None:
    save(client, SMALL, new_chain(SMALL, 1))
    refused(lambda: client.admin.get_session("user 17", SMALL.fingerprint), "is not a session id", "1 to 200")


@pytest.mark.parametrize("session_id", ["a", "A-z_0.9:@/+=~", "x" * 200])
def test_a_session_id_that_follows_the_rule_is_taken(client: Client, session_id: str) -> None:
    chain = new_chain(SMALL, 1)
    save(client, SMALL, chain)
    session = client.session(SMALL, session_id)
    assert session.append(chain).session_id == session_id
    assert session.end()


@pytest.mark.parametrize("span", NO_SPANS, ids=repr)
def test_what_is_no_span_of_time_is_refused_everywhere(client: Client, away: Client, span: Any) -> None:
    chain = new_chain(SMALL, 1)
    blocks, session = away.open_layout(SMALL), away.session(SMALL, "chat")
    rule = "it must be a number of seconds from 0 to 1e9"
    refused(lambda: Client("127.0.0.1:1", timeout_s=span), "timeout_s", rule)
    refused(lambda: Client("127.0.0.1:1", reconnect_wait_s=span), "reconnect_wait_s", rule)
    refused(lambda: away.capabilities(span), "timeout_s", rule)
    refused(lambda: blocks.lookup(chain, timeout_s=span), "timeout_s", rule)
    refused(lambda: blocks.lookup(chain, span), "lease_ttl_s", rule)
    refused(lambda: blocks.begin_lookup(chain, timeout_s=span), "timeout_s", rule)
    refused(lambda: blocks.begin_lookup(chain, span), "lease_ttl_s", rule)
    refused(lambda: blocks.begin_lookup(chain, ticket_ttl_s=span), "ticket_ttl_s", rule)
    refused(lambda: blocks.lookup_local(chain, span), rule)
    refused(lambda: blocks.contains(chain, span), rule)
    refused(lambda: blocks.save(chain, layers_of(SMALL, chain), timeout_s=span), rule)
    refused(lambda: blocks.ping(span), rule)
    refused(lambda: session.get(span), rule)
    refused(lambda: session.append(chain, timeout_s=span), rule)
    refused(lambda: session.lookup(timeout_s=span), rule)
    refused(lambda: session.end(span), rule)
    refused(lambda: away.prefetch(chain.keys, deadline_s=span), "deadline_s", rule)
    refused(lambda: away.evict(chain.keys, "dram", span), rule)
    refused(lambda: away.admin.status(span), rule)
    refused(lambda: away.admin.pin(chain.keys, span), "ttl_s", rule)
    refused(lambda: away.admin.scrub(timeout_s=span), rule)
    save(client, SMALL, chain)
    with client.open_layout(SMALL).lookup(chain) as lease:
        refused(lambda: lease.load(timeout_s=span), rule)
        refused(lambda: lease.renew(span), "ttl_s", rule)
        refused(lambda: lease.renew(timeout_s=span), rule)
        refused(lambda: lease.view(timeout_s=span), rule)
        assert lease.remaining_s > 0


@pytest.mark.parametrize("span", [np.float32(20.0), np.int64(20), 20])
def test_numbers_of_all_kinds_are_spans(client: Client, span: Any) -> None:
    assert client.admin.status(span).state == "serving"


@pytest.mark.parametrize("rate", [-1.0, math.nan, math.inf, "1e6", None, True], ids=repr)
def test_what_is_no_rate_is_refused(rate: Any) -> None:
    refused(lambda: Client("127.0.0.1:1", throttle_bytes_per_s=rate), "throttle_bytes_per_s", "bytes per second")


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"transport": "rdma"}, "'auto', 'shm', 'bulk' or 'grpc'"),
        ({"transport": None}, "'auto', 'shm', 'bulk' or 'grpc'"),
        ({"tls": "ca.pem"}, "TlsFiles"),
        ({"tls": True}, "TlsFiles"),
        ({"name": 7}, "text of at most 200 characters"),
        ({"name": "x" * 201}, "text of at most 200 characters"),
        ({"name": b"engine"}, "text of at most 200 characters"),
    ],
)
def test_wrong_options_of_a_client_are_refused(options: dict[str, Any], word: str) -> None:
    refused(lambda: Client("127.0.0.1:1", **options), word)


@pytest.mark.parametrize("layout", [None, "model", {"layers": 2}, 7, Shard(0, 1, 0, 1), Layout], ids=repr)
def test_what_is_no_layout_is_refused(away: Client, layout: Any) -> None:
    refused(lambda: away.open_layout(layout), "must be a Layout")
    refused(lambda: away.session(layout, "chat"), "must be a Layout")


@pytest.mark.parametrize("layout", [None, "model", {"layers": 2}, 7], ids=repr)
def test_a_chain_of_no_layout_is_refused(layout: Any) -> None:
    refused(lambda: block_chain(layout, [1, 2, 3]), "must be a Layout")


@pytest.mark.parametrize("shard", ["whole", (0, 1, 0, 1), SMALL, Shard(0, 99, 0, 1)], ids=repr)
def test_what_is_no_shard_of_the_layout_is_refused(away: Client, shard: Any) -> None:
    refused(lambda: away.open_layout(SMALL, shard), "shard")


@pytest.mark.parametrize("chain", [None, [1, 2, 3], [b"k" * 32], "chain", np.arange(64), 7], ids=repr)
def test_what_is_no_chain_is_refused(away: Client, chain: Any) -> None:
    blocks = away.open_layout(SMALL)
    for call in (
        blocks.lookup,
        blocks.contains,
        blocks.lookup_local,
        blocks.peek,
        blocks.begin_lookup,
        away.session(SMALL, "chat").append,
        lambda chain: blocks.save(chain, []),
    ):
        refused(partial(call, chain), "chain", "must be a BlockChain")


@pytest.mark.parametrize("keys", [[b"short"], ["k" * 32], [None], [bytes(33)], bytes(32), "keys", 7, None], ids=repr)
def test_what_are_no_keys_is_refused(client: Client, keys: Any) -> None:
    for call in (
        client.prefetch,
        lambda keys: client.evict(keys, "dram"),
        client.admin.discard,
        lambda keys: client.admin.pin(keys, 1.0),
        client.admin.unpin,
    ):
        refused(lambda call=call: call(keys), "key", "32 bytes")  # type: ignore[misc]


@pytest.mark.parametrize("key", [b"", bytes(31), "k" * 32, None, 7], ids=repr)
def test_what_is_no_key_is_refused(away: Client, key: Any) -> None:
    refused(lambda: away.admin.inspect(key), "32 bytes")
    refused(lambda: away.admin.explain_block(key), "32 bytes")


def test_words_that_are_not_known_are_refused_with_those_that_are(away: Client) -> None:
    chain = new_chain(SMALL, 1)
    refused(lambda: away.evict(chain.keys, "GPU 0"), "tier", "'dram', 'ssd'")
    refused(lambda: next(away.admin.list_blocks("GPU 0")), "tier", "'dram', 'ssd'")
    refused(lambda: away.admin.scrub("GPU 0"), "tier", "'dram', 'ssd'")
    blocks, layers = away.open_layout(SMALL), layers_of(SMALL, chain)
    refused(lambda: blocks.save(chain, layers, "tape"), "durability", "'dram', 'ssd'")  # type: ignore[arg-type]
    report = RequestReport(request_id="r", outcome="well")  # type: ignore[arg-type]
    refused(lambda: away.report_request(report), "outcome", "'done'")


def test_values_of_the_wrong_type_or_range_are_refused(client: Client, away: Client) -> None:
    chain = new_chain(SMALL, 2)
    save(client, SMALL, chain)
    blocks: Any = client.open_layout(SMALL)
    session: Any = client.session(SMALL, "typed")
    refused(lambda: blocks.lookup(chain, request_id=7))
    refused(lambda: blocks.begin_lookup(chain, request_id=7))
    refused(lambda: blocks.begin_lookup(chain, ticket_ttl_s=0.0), "ticket_ttl_s is 0")
    refused(lambda: session.append(chain, "first"))
    refused(lambda: session.append(chain, -1))
    refused(lambda: session.append(chain, stored_position="first"))
    state = session.append(chain)
    wrong: list[Any] = [[0, 4], [(0,)], [("0", 4)], [(-1, 4)], 7, None]
    for keep in wrong:
        refused(partial(session.truncate, keep, state.revision))
    refused(lambda: session.lookup(state.revision), "must be a SessionState")
    assert session.end()
    reporting: Any = away.report_request
    refused(lambda: reporting("request"), "must be a RequestReport")
    with blocks.lookup(chain) as lease:
        refused(lambda: lease.load(first_block="0"), "first_block")
        refused(lambda: lease.load(block_count=1.5), "block_count")


NO_NUMBERS: list[Any] = [1.5, "1", None, [1], True, math.nan, -1, 2**32]


@pytest.mark.parametrize("wrong", NO_NUMBERS, ids=repr)
def test_counts_and_places_are_whole_numbers(client: Client, wrong: Any) -> None:
    chain, blocks = new_chain(SMALL, 2), client.open_layout(SMALL)
    save(client, SMALL, chain)
    with blocks.lookup(chain) as lease:
        refused(lambda: lease.export(adoptions=wrong), "adoptions is", "whole number in 1..")
        refused(lambda: blocks.begin_lookup(chain, adoptions=wrong), "adoptions is", "whole number in 0..")
        if wrong is not None:
            refused(lambda: lease.layer_bytes(layer=wrong), "layer is", "whole number in 0..4")
            refused(lambda: lease.layer_bytes(0, wrong))
            refused(lambda: blocks.slice_bytes(16, wrong), "layer is")
        refused(lambda: lease.load(first_block=wrong))
        refused(lambda: blocks.slice_bytes(wrong), "token_counts is")
        assert list(lease.load(first_block=np.int64(1), block_count=np.int32(1)))  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", NO_SPANS, ids=repr)
def test_tickets_and_their_leases_last_for_spans_of_time(client: Client, wrong: Any) -> None:
    chain, blocks = new_chain(SMALL, 1), client.open_layout(SMALL)
    save(client, SMALL, chain)
    with blocks.lookup(chain) as lease:
        refused(lambda: lease.export(ttl_s=wrong), "ttl_s is")
        ticket = lease.export()
        refused(lambda: blocks.adopt(ticket, lease_ttl_s=wrong), "lease_ttl_s is")
        refused(lambda: lease.release(timeout_s=wrong), "timeout_s is")
        with blocks.adopt(ticket) as adopted:
            assert adopted.hit_blocks == 1


def test_shards_buffers_and_names_are_what_they_should_be(client: Client) -> None:
    chain, blocks = new_chain(SMALL, 1), client.open_layout(SMALL)
    layers: Any = [np.concatenate(layer) for layer in layers_of(SMALL, chain)]
    blocks.save(chain, layers)
    with blocks.lookup(chain) as lease:
        for wrong in ("x", 3, (0, 1, 0, 1)):
            refused(lambda wrong=wrong: blocks.adopt(lease.export(), wrong), "shard is of type")  # type: ignore[misc]
        for no_sequence in (3, iter(layers), "layers", b"layers"):
            refused(lambda wrong=no_sequence: lease.load(into=wrong), "into is of type")  # type: ignore[misc]
            refused(lambda wrong=no_sequence: blocks.save(chain, wrong), "layers is of type")  # type: ignore[misc]
    masked = [np.ma.masked_array(layer) for layer in layers]
    refused(lambda: blocks.save(chain, masked), "layers[0] is a masked array")
    for no_text in (3, None, b"id", "x" * 201, "ä" * 101):
        refused(lambda wrong=no_text: blocks.lookup(chain, request_id=wrong), "request_id must be text")  # type: ignore[misc]
