"""Requests that are not possible are refused with a reason, and lose nothing."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message_factory import GetMessageClass

from kvservice_api.errors import (
    IndexFull,
    InvalidLayout,
    InvalidRequest,
    KVError,
    LayoutMismatch,
    LeaseExpired,
    LeaseNotYours,
    Overloaded,
    ScrubRunning,
    UnknownClient,
    UnknownLayout,
)
from kvservice_api.keys import BlockChain
from kvservice_api.v1 import admin_pb2, blocks_pb2, types_pb2
from kvservice_client import Durability, block_chain
from tests.daemon import MIB, DaemonProcess, until
from tests.integration.known_blocks import LARGE, SMALL, new_chain, save, verify
from tests.integration.test_rpc_all import METHODS
from tests.integration.wire import Upload, Wire, refused

NewDaemon = Callable[..., DaemonProcess]
KEY = bytes(range(32))
U32_MAX = 2**32 - 1
TIER_7: Any = 7  # Protobuf takes any number.


# Layouts


@pytest.mark.parametrize(
    ("changes", "field", "message"),
    [
        *[({name: 0}, name, f"{name} is 0; it must be in 1") for name in ("layers", "kv_heads", "k_head_dim")],
        ({"block_tokens": 0}, "block_tokens", "block_tokens is 0; it must be in 1"),
        *[
            ({name: U32_MAX}, name, f"{name} is {U32_MAX}; it must be in")
            for name in ("layers", "kv_heads", "k_head_dim", "v_head_dim", "block_tokens")
        ],
        (
            {"kv_heads": 4096, "k_head_dim": 65536, "v_head_dim": 65536, "block_tokens": 65536},
            "block_tokens",
            "one layer of one block would take 70368744177664 bytes",
        ),
        ({"dtype": "float64"}, "dtype", "dtype 'float64' is not one of float32"),
        ({"model_id": ""}, "model_id", "model_id is empty"),
        ({"model_revision": "r" * 1025}, "model_revision", "longer than 1024 bytes"),
        ({"rotary": types_pb2.Rotary()}, "rotary", "pairing '' is not one of half"),
        ({"rotary": types_pb2.Rotary(pairing="half", dims=17)}, "rotary", "rotary.dims is 17; it must be in 0..16"),
        ({"rotary": types_pb2.Rotary(pairing="half", base=float("nan"))}, "rotary", "not a finite number"),
    ],
    ids=str,
)
def test_an_impossible_layout_is_refused_by_the_name_of_its_dimension(
    wire: Wire, changes: dict[str, Any], field: str, message: str
) -> None:
    layout = types_pb2.Layout(**{**{name.name: value for name, value in SMALL.to_proto().ListFields()}, **changes})
    with refused(InvalidLayout, message, field=field):
        wire.blocks.OpenLayout(blocks_pb2.OpenLayoutRequest(layout=layout, fingerprint=SMALL.fingerprint))


@pytest.mark.parametrize("fingerprint", [KEY, SMALL.fingerprint[:31], b""], ids=["another", "a short one", "none"])
def test_a_fingerprint_that_differs_is_refused(wire: Wire, fingerprint: bytes) -> None:
    with refused(LayoutMismatch, f"not {fingerprint.hex() or 'empty'}", expected=SMALL.fingerprint.hex()):
        wire.blocks.OpenLayout(blocks_pb2.OpenLayoutRequest(layout=SMALL.to_proto(), fingerprint=fingerprint))


@pytest.mark.parametrize("fingerprint", [KEY, KEY[:5], b""], ids=["another", "a short one", "none"])
def test_an_unknown_layout_is_refused_with_a_message_that_says_to_open_it(wire: Wire, fingerprint: bytes) -> None:
    message = f"no layout with fingerprint {fingerprint.hex() or '.empty.'} was opened here"
    with refused(UnknownLayout, message):
        wire.blocks.LookupPrefix(blocks_pb2.LookupPrefixRequest(layout_fingerprint=fingerprint, keys=KEY))
    upload = Upload.of(wire, SMALL, new_chain(SMALL))
    upload.header.layout_fingerprint = fingerprint
    with refused(UnknownLayout, message):
        wire.save(upload.messages())


# Keys


def with_keys(wire: Wire, method: str, keys: bytes) -> None:
    upload = Upload.of(wire, SMALL, new_chain(SMALL))
    upload.header.keys = keys
    fingerprint = SMALL.fingerprint
    calls: dict[str, Callable[[], object]] = {
        "LookupPrefix": lambda: wire.blocks.LookupPrefix(
            blocks_pb2.LookupPrefixRequest(layout_fingerprint=fingerprint, keys=keys)
        ),
        "SaveBlocks": lambda: wire.save(upload.messages()),
        "Prefetch": lambda: wire.blocks.Prefetch(blocks_pb2.PrefetchRequest(keys=keys)),
        "Evict": lambda: wire.blocks.Evict(blocks_pb2.EvictRequest(keys=keys, tier=types_pb2.TIER_SSD)),
        "Discard": lambda: wire.admin.Discard(admin_pb2.DiscardRequest(keys=keys)),
    }
    calls[method]()


@pytest.mark.parametrize("method", ["LookupPrefix", "SaveBlocks", "Prefetch", "Evict", "Discard"])
@pytest.mark.parametrize("size", [1, 31, 33, 65])
def test_keys_of_the_wrong_length_are_refused(wire: Wire, method: str, size: int) -> None:
    with refused(InvalidRequest, f"keys has {size} bytes; it must hold keys of 32 bytes", field="keys"):
        with_keys(wire, method, bytes(size))


@pytest.mark.parametrize("method", ["LookupPrefix", "SaveBlocks", "Prefetch", "Evict", "Discard"])
def test_an_empty_list_of_keys_is_refused(wire: Wire, method: str) -> None:
    with refused(InvalidRequest, "keys", field="keys"):
        with_keys(wire, method, b"")


@pytest.mark.parametrize("method", ["LookupPrefix", "SaveBlocks", "Prefetch", "Evict", "Discard"])
def test_an_over_long_list_of_keys_is_refused(wire: Wire, method: str) -> None:
    limits = wire.capabilities()
    most = {"SaveBlocks": limits.max_save_blocks, "Discard": 65_536}.get(method, limits.max_keys)
    with refused(InvalidRequest, f"keys holds {most + 1} keys; at most {most} are allowed", field="keys"):
        with_keys(wire, method, KEY * (most + 1))


def test_a_request_larger_than_grpc_takes_is_refused_by_grpc(wire: Wire) -> None:
    with pytest.raises(grpc.RpcError, match="Received message larger than max") as caught:
        with_keys(wire, "LookupPrefix", KEY * 200_000)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.mark.parametrize("key", [b"", KEY[:31], KEY + b"x"], ids=["none", "short", "long"])
def test_one_key_of_the_wrong_length_is_refused(wire: Wire, key: bytes) -> None:
    with refused(InvalidRequest, f"a key has 32 bytes, not {len(key)}", field="key"):
        wire.admin.Inspect(admin_pb2.InspectRequest(key=key))


@pytest.mark.parametrize(
    ("token", "message"),
    [
        (2**32, rf"token id 4294967296 is not in 0\.\.{U32_MAX}"),
        (-1, rf"token id -1 is not in 0\.\.{U32_MAX}"),
        (2**64, "token ids must be integers"),
        (0.5, "token ids must be integers, not float64"),
    ],
)
def test_token_ids_that_are_no_u32_never_reach_the_wire(token: float, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message) as caught:
        block_chain(SMALL, [*range(15), token])
    assert caught.value.details == {"field": "token_ids"}


# Other wrong fields


def lookup(**fields: Any) -> Callable[[Wire], object]:
    fields = {"layout_fingerprint": SMALL.fingerprint, "keys": KEY, **fields}
    return lambda wire: wire.blocks.LookupPrefix(blocks_pb2.LookupPrefixRequest(**fields))


def list_blocks(**fields: Any) -> Callable[[Wire], object]:
    return lambda wire: wire.admin.ListBlocks(admin_pb2.ListBlocksRequest(**fields))


def discard(**fields: Any) -> Callable[[Wire], object]:
    return lambda wire: wire.admin.Discard(admin_pb2.DiscardRequest(**fields))


def shard(layers: tuple[int, int], heads: tuple[int, int]) -> types_pb2.Shard:
    return types_pb2.Shard(layer_begin=layers[0], layer_end=layers[1], head_begin=heads[0], head_end=heads[1])


REFUSED: dict[str, tuple[Callable[[Wire], object], type[KVError], str]] = {
    "a shard without layers": (
        lookup(shard=shard((2, 2), (0, 3))), InvalidRequest, "shard layers 2..2, heads 0..3 is not within 5 layers"),
    "a shard that ends before it begins": (lookup(shard=shard((3, 1), (0, 3))), InvalidRequest, "shard layers 3..1"),
    "a shard beyond the layers": (lookup(shard=shard((0, U32_MAX), (0, 3))), InvalidRequest, "shard layers 0.."),
    "a shard beyond the heads": (lookup(shard=shard((0, 5), (2, 4))), InvalidRequest, "heads 2..4 is not within"),
    "a lease for a client that is not attached": (
        lookup(client_id=bytes(16), lease_ttl_ms=1), UnknownClient, "no attached client has this id: attach"),
    "a lease without a client": (lookup(lease_ttl_ms=1), UnknownClient, "no attached client has this id"),
    "an eviction from no tier": (
        lambda wire: wire.blocks.Evict(blocks_pb2.EvictRequest(keys=KEY)), InvalidRequest, "name the tier: this store"),
    "an eviction from a tier of the future": (
        lambda wire: wire.blocks.Evict(blocks_pb2.EvictRequest(keys=KEY, tier=TIER_7)), InvalidRequest, "the number 7"),
    "a list of a tier of the future": (list_blocks(tier=TIER_7), InvalidRequest, "no tier has the number 7"),
    "a page of more than a thousand": (list_blocks(page_size=1001), InvalidRequest, "page_size is 1001; at most 1000"),
    "a page token of another daemon": (list_blocks(page_token="1.0"), InvalidRequest, "issued no such page token"),
    "an invalid page token": (list_blocks(page_token="next, please"), InvalidRequest, "issued no such page token"),
    "a list of half a fingerprint": (
        list_blocks(layout_fingerprint=KEY[:16]), InvalidRequest, "a fingerprint has 32 bytes, not 16"),
    "a discard of nothing": (discard(), InvalidRequest, "exactly one of keys, layout_fingerprint and everything"),
    "a discard of two things": (discard(keys=KEY, everything=True), InvalidRequest, "exactly one of keys"),
    "a discard of half a fingerprint": (
        discard(layout_fingerprint=KEY[:16]), InvalidRequest, "a fingerprint has 32 bytes, not 16"),
    "a discard of an unknown layout": (discard(layout_fingerprint=KEY), UnknownLayout, "no layout with fingerprint"),
    "a scrub of a tier of the future": (
        lambda wire: list(wire.admin.Scrub(admin_pb2.ScrubRequest(tier=TIER_7))), InvalidRequest, "no tier has"),
    "a name that is too long": (lambda wire: wire.attach("n" * 201), InvalidRequest, "name"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_field_out_of_its_range_is_refused(wire: Wire, case: str) -> None:
    call, kind, message = REFUSED[case]
    with refused(kind, message):
        call(wire)


@pytest.mark.parametrize("garbage", [b"\xff\xff\xff", b"\x0a\x7f", b"\x12\x01"], ids=bytes.hex)
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_bytes_that_are_no_message_are_refused(wire: Wire, method: Any, garbage: bytes) -> None:
    call = wire.channel.stream_stream(f"/{method.containing_service.full_name}/{method.name}", None, None)
    with pytest.raises(grpc.RpcError) as caught:
        list(call(iter([garbage]), timeout=10))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert re.search("malformed|not a frame", str(caught.value.details()))


# Leases


def test_an_expired_lease_cannot_be_used_and_may_be_released(wire: Wire, kept: BlockChain) -> None:
    lease_id = wire.lookup(SMALL, kept, ttl_ms=50).lease_id
    until(lambda: wire.status().leases == 0)
    for use in (wire.load, wire.renew):
        with refused(LeaseExpired, "the lease has ended: look the prefix up again", lease_id=str(lease_id)):
            use(lease_id)
    wire.release(lease_id)


def test_a_lease_that_was_never_granted_cannot_be_used(wire: Wire) -> None:
    for lease_id in (0, 1, 2**64 - 1):
        with refused(LeaseExpired, "the lease has ended"):
            wire.load(lease_id)
        with refused(LeaseExpired, "the lease has ended"):
            wire.renew(lease_id)
        wire.release(lease_id)


def test_another_clients_lease_cannot_be_loaded_renewed_or_released(
    wire: Wire, kept: BlockChain, daemon: DaemonProcess
) -> None:
    lease_id = wire.lookup(SMALL, kept).lease_id
    with Wire(daemon.address) as thief:
        thief.attach()
        for use in (thief.load, thief.renew, thief.release):
            with refused(LeaseNotYours, "the lease belongs to another client", lease_id=str(lease_id)):
                use(lease_id)
        thief.client_id = b"unknown"
        for use in (thief.load, thief.renew):
            with refused(UnknownClient, "no attached client has this id"):
                use(lease_id)
    assert len(wire.load(lease_id)) == SMALL.layers


_NAMES_A_CLIENT = [method for method in METHODS if {"client_id", "header"} & set(method.input_type.fields_by_name)]


@pytest.mark.parametrize("method", _NAMES_A_CLIENT, ids=lambda method: method.name)
def test_every_request_that_names_a_client_which_is_not_attached_is_refused(
    daemon: DaemonProcess, wire: Wire, kept: BlockChain, method: MethodDescriptor
) -> None:
    with Wire(daemon.address) as gone:
        gone.attach("gone")
        upload = Upload.of(gone, SMALL, new_chain(SMALL))
        lease_id = gone.lookup(SMALL, kept).lease_id
    until(lambda: wire.status().clients == 2)
    fields: dict[str, Any] = {
        "client_id": gone.client_id,
        "header": upload.header,
        "lease_id": lease_id,
        "layout_fingerprint": SMALL.fingerprint,
        "keys": kept.packed_keys,
        "reservation_id": 1,
        "ttl_ms": 1000,
        "lease_ttl_ms": 0 if method.name == "LookupPrefix" else 1000,
        "adoptions": 1,
        "ticket": bytes(96),
    }
    known = method.input_type.fields_by_name
    request = GetMessageClass(method.input_type)(**{name: value for name, value in fields.items() if name in known})
    call = wire.channel.stream_stream(f"/{method.containing_service.full_name}/{method.name}", None, None)
    with refused(UnknownClient, "no attached client has this id"):
        list(call(iter([request.SerializeToString()]), timeout=10))


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"first_block": 3}, r"blocks 3\.\.3 are not in the lease's 3"),
        ({"block_count": 4}, r"blocks 0\.\.4 are not in the lease's 3"),
        ({"first_block": 1, "block_count": U32_MAX}, "blocks 1.."),
        ({"first_layer": 5}, r"layers 5\.\.5 are not in the lease's 5"),
        ({"first_layer": 4, "layer_count": 2}, r"layers 4\.\.6 are not in the lease's 5"),
    ],
    ids=str,
)
def test_a_load_beyond_the_lease_is_refused(wire: Wire, kept: BlockChain, part: dict[str, int], message: str) -> None:
    lease_id = wire.lookup(SMALL, kept).lease_id
    with refused(InvalidRequest, message):
        wire.load(lease_id, **part)


def test_a_lease_is_not_renewed_for_no_time(wire: Wire, kept: BlockChain) -> None:
    with refused(InvalidRequest, "ttl_ms is 0; to end a lease, release it", field="ttl_ms"):
        wire.renew(wire.lookup(SMALL, kept).lease_id, ttl_ms=0)


# Too much at once


def test_requests_beyond_a_limit_are_refused_with_a_time_to_retry(new_daemon: NewDaemon) -> None:
    daemon = new_daemon(server__clients_max=2, server__loads_max=1, server__keys_max=64, leases__per_client_max=2)
    with Wire(daemon.address) as wire:
        wire.attach()
        wire.open_layout(LARGE)
        chain = new_chain(LARGE, 64)  # 12 MiB: more than the connection buffers of a load whose client does not read.
        until(lambda: wire.status().dram.capacity_bytes > 48 * MIB)
        assert wire.save(Upload.of(wire, LARGE, chain).messages()).stored == 64

        lease_id = wire.lookup(LARGE, chain).lease_id
        wire.lookup(LARGE, chain)
        with refused(Overloaded, "the client holds 2 leases, which is the maximum"):
            wire.lookup(LARGE, chain)

        request = blocks_pb2.LoadBlocksRequest(client_id=wire.client_id, lease_id=lease_id)
        load = wire.blocks.LoadBlocks(request)
        next(load)
        with refused(Overloaded, "1 loads are open, the most that this daemon takes"):
            wire.load(lease_id)

        with Wire(daemon.address) as second, Wire(daemon.address) as third:
            second.attach()
            with refused(Overloaded, "2 clients are attached, the most that this daemon takes"):
                third.attach()

        with refused(InvalidRequest, "keys holds 65 keys; at most 64 are allowed"):
            wire.lookup(LARGE, new_chain(LARGE, 65))
        load.cancel()
        until(lambda: not failed(lambda: wire.load(lease_id)))
        state = wire.state()
        assert (state["clients"], state["leases"], state["blocks in DRAM"]) == (1, 2, 64)


def failed(call: Callable[[], object]) -> bool:
    try:
        call()
    except grpc.RpcError:
        return True
    return False


def test_one_scrub_runs_at_a_time(wire: Wire) -> None:
    running = wire.admin.Scrub(admin_pb2.ScrubRequest(bytes_per_second=1))
    until(lambda: wire.status().counters["scrubbed_bytes"] > 0)
    with refused(ScrubRunning, "another scrub is under way: wait for it"):
        list(wire.admin.Scrub(admin_pb2.ScrubRequest()))
    running.cancel()
    until(lambda: not failed(lambda: list(wire.admin.Scrub(admin_pb2.ScrubRequest()))))


def test_more_layouts_than_the_store_may_know_are_refused_until_a_start_forgets_those_without_blocks(
    new_daemon: NewDaemon,
) -> None:
    daemon = new_daemon(index__layouts_max=2)
    third = replace(SMALL, model_id="third")
    chain, of_third = new_chain(SMALL), new_chain(third)
    with daemon.client() as client:
        save(client, SMALL, chain, Durability.SSD)
        client.open_layout(replace(SMALL, model_id="second")).contains(chain)
        with pytest.raises(IndexFull, match=r"2 layouts, as many as index.layouts_max allows"):
            save(client, third, of_third)
    daemon.stop()
    daemon.start()
    with daemon.client() as client:
        [removed] = daemon.logged("layouts without blocks are removed, because there were too many")
        assert removed["event"].endswith(": 1")
        assert save(client, third, of_third).is_complete
        for layout, blocks in ((SMALL, chain), (third, of_third)):
            verify(client, layout, blocks)
