"""Invalid saves are refused with a reason: nothing of them is kept, and nothing else is lost."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2

from kvservice_api.errors import IncompleteSave, InvalidFrame, InvalidRequest, KVError, UnknownClient, UploadCorrupted
from kvservice_api.keys import BlockChain
from kvservice_api.v1 import admin_pb2, types_pb2
from kvservice_api.v1 import blocks_pb2 as pb
from tests.daemon import DaemonProcess, until
from tests.integration.known_blocks import SMALL, new_chain, slice_bytes
from tests.integration.wire import Feed, Upload, Wire, refused

SIZE = slice_bytes(SMALL)
U32_MAX, U64_MAX = 2**32 - 1, 2**64 - 1


@pytest.fixture
def chain() -> BlockChain:
    return new_chain(SMALL, 2)


@pytest.fixture
def upload(wire: Wire, chain: BlockChain) -> Upload:
    return Upload.of(wire, SMALL, chain)


# One frame is wrong; all the others are right.


def frame(**changes: Any) -> pb.SaveBlocksRequest:
    return pb.SaveBlocksRequest(**{"payload": bytes(SIZE), **changes})


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (frame(layer=5), "layer 5 or block 0 is outside the save"),
        (frame(layer=U32_MAX), f"layer {U32_MAX} or block 0 is outside the save"),
        (frame(first_block=2), "layer 0 or block 2 is outside the save"),
        (frame(first_block=U32_MAX), f"layer 0 or block {U32_MAX} is outside the save"),
        (frame(first_offset_bytes=SIZE), "is empty, or starts after its block's slice"),
        (frame(first_offset_bytes=U64_MAX), "is empty, or starts after its block's slice"),
        (frame(first_block=1, first_offset_bytes=1), "reaches beyond the last block"),
        (frame(payload=bytes(2 * SIZE + 1)), "reaches beyond the last block"),
        (frame(payload=b""), "is empty, or starts after its block's slice"),
        (frame(layer=1, payload=b""), "is empty, or starts after its block's slice"),
        (frame(payload=bytes(2**21 + 1)), "a frame carries 2097153 bytes; at most 2097152 are allowed"),
    ],
    ids=itertools.count(),
)
def test_a_frame_out_of_range_or_too_large_is_refused(
    wire: Wire, upload: Upload, chain: BlockChain, wrong: pb.SaveBlocksRequest, message: str
) -> None:
    for place in (0, len(upload.frames) // 2):
        frames = [*upload.frames[:place], wrong, *upload.frames[place:]]
        with refused(InvalidFrame, message):
            wire.save([upload.first, *(frame.SerializeToString() for frame in frames), upload.last])
        assert wire.lookup(SMALL, chain).hit_blocks == 0


@pytest.mark.parametrize(
    ("start", "end"),
    [(0, SIZE), (0, 1), (SIZE - 1, SIZE), (1000, 2000)],
    ids=["the same frame twice", "one byte at the start", "one byte at the end", "some bytes within"],
)
@pytest.mark.parametrize("first", [True, False], ids=["before the whole", "after the whole"])
def test_bytes_that_come_twice_are_refused(wire: Wire, upload: Upload, first: bool, start: int, end: int) -> None:
    part = frame(layer=2, first_block=1, first_offset_bytes=start, payload=bytes(end - start))
    whole = next(n for n, frame in enumerate(upload.frames) if (frame.layer, frame.first_block) == (2, 1))
    upload.frames.insert(whole if first else whole + 1, part)
    with refused(InvalidFrame, r"bytes \d+\.\.\d+ of layer 2 arrived before", layer="2"):
        wire.save(upload.messages())


def test_parts_that_overlap_beyond_a_gap_are_refused(wire: Wire, upload: Upload) -> None:
    upload.frames = [
        frame(first_offset_bytes=1000, payload=bytes(500)),
        frame(first_offset_bytes=2000, payload=bytes(500)),
        frame(first_offset_bytes=1400, payload=bytes(601)),
    ]
    with refused(InvalidFrame, r"bytes 1400\.\.2001 of layer 0 arrived before"):
        wire.save(upload.messages())


def test_a_frame_cut_off_anywhere_is_refused(wire: Wire, upload: Upload) -> None:
    whole = frame(layer=1, first_block=1, first_offset_bytes=1, payload=bytes(1000)).SerializeToString()
    head = len(whole) - 1000
    for length in [*range(1, head), head, head + 1, head + 999]:
        messages = [upload.first, whole[:length], upload.last]
        with pytest.raises(grpc.RpcError) as caught:
            wire.save(messages)
        # If the cut is between two fields, the rest is a frame without a payload.
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT, length
        assert re.search("is cut off or not a frame|is empty", str(caught.value.details())), length


def test_a_message_larger_than_grpc_takes_is_refused_by_grpc(wire: Wire, upload: Upload) -> None:
    with pytest.raises(grpc.RpcError, match="Received message larger than max") as caught:
        wire.save([upload.first, frame(payload=bytes(2**23)).SerializeToString(), upload.last])
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


# The messages of a save come in the wrong order, or not at all.


def further(upload: Upload, **changes: Any) -> pb.SaveChain:
    """A chain of one block after those of the header."""
    return pb.SaveChain(**{"parent_key": bytes(32), "keys": bytes(32), **changes})


def header(upload: Upload, **changes: Any) -> bytes:
    fields = {field.name: value for field, value in upload.header.ListFields()}
    return pb.SaveBlocksRequest(header=pb.SaveHeader(**{**fields, **changes})).SerializeToString()


def commit(checksums: bytes) -> bytes:
    return pb.SaveBlocksRequest(commit=pb.SaveCommit(checksums=checksums)).SerializeToString()


def with_header(upload: Upload, message: bytes) -> bytes:
    """Two kinds in one message."""
    return upload.first + message


STREAMS: dict[str, tuple[Callable[[Upload], list[bytes]], type[KVError], str]] = {
    "nothing at all": (lambda u: [], IncompleteSave, "ended without a commit"),
    "no header": (lambda u: u.messages()[1:], InvalidRequest, "first message of a save must be its header"),
    "only a commit": (lambda u: [u.last], InvalidRequest, "first message of a save must be its header"),
    "an empty message": (lambda u: [b""], InvalidRequest, "first message of a save must be its header"),
    "an empty message within": (lambda u: [u.first, b"", u.last], InvalidFrame, "the payload is empty"),
    "only a header": (lambda u: [u.first], IncompleteSave, "ended without a commit"),
    "no commit": (lambda u: u.messages()[:-1], IncompleteSave, "ended without a commit"),
    "two headers": (lambda u: [u.first, *u.messages()], InvalidRequest, "a save has one header"),
    "a header at the end": (lambda u: [*u.messages()[:-1], u.first], InvalidRequest, "a save has one header"),
    "header and frame in one": (
        lambda u: [with_header(u, u.frames[0].SerializeToString())], InvalidFrame, "exactly one of a header"),
    "header and commit in one": (lambda u: [with_header(u, u.last)], InvalidFrame, "exactly one of a header"),
    "a commit without data": (lambda u: [u.first, u.last], IncompleteSave, "bytes of block 0 are missing"),
    "a frame less": (
        lambda u: [u.first, *[f.SerializeToString() for f in u.frames[:-1]], u.last],
        IncompleteSave, "bytes of block 1 are missing"),
    "a byte less": (
        lambda u: [u.first, frame(payload=bytes(SIZE - 1)).SerializeToString(),
                   *[f.SerializeToString() for f in u.frames[1:]], u.last],
        IncompleteSave, "bytes of block 0 are missing"),
    "a second commit": (lambda u: [*u.messages(), u.last], InvalidRequest, "nothing may follow the commit"),
    "a frame after the commit": (
        lambda u: [*u.messages(), u.frames[0].SerializeToString()], InvalidRequest, "nothing may follow the commit"),
    "no checksums": (
        lambda u: [*u.messages()[:-1], commit(b"")], InvalidRequest, "0 checksums were sent for 2 blocks of 5 layers"),
    "too many checksums": (
        lambda u: [*u.messages()[:-1], commit(bytes(88))], InvalidRequest, "11 checksums were sent for 2 blocks"),
    "half a checksum": (
        lambda u: [*u.messages()[:-1], commit(bytes(84))], InvalidRequest, "checksums must have 8 bytes each"),
    "a key twice": (
        lambda u: [header(u, keys=u.header.keys[:32] * 2)], InvalidRequest, "a key appears twice in one save"),
    "a further chain with half a parent": (
        lambda u: [header(u, more=[further(u, parent_key=bytes(16))])], InvalidRequest, "parent_key has 16 bytes"),
    "a further chain without keys": (
        lambda u: [header(u, more=[further(u, keys=b"")])], InvalidRequest, "keys has 0 bytes"),
    "a key twice in a further chain": (
        lambda u: [header(u, more=[further(u, keys=bytes(64))])], InvalidRequest, "a key appears twice in one save"),
    "too many keys together": (
        lambda u: [header(u, more=[further(u)] * 255)], InvalidRequest, "the chains have 257 keys; at most 256"),
    "a further chain with too many tokens": (
        lambda u: [header(u, more=[further(u, last_block_tokens=17)])], InvalidRequest, "a block has 1"),
    "half a parent": (
        lambda u: [header(u, parent_key=bytes(16))], InvalidRequest, "parent_key has 16 bytes, not 32"),
    "no parent": (lambda u: [header(u, parent_key=b"")], InvalidRequest, "parent_key has 0 bytes, not 32"),
    "more tokens than a block has": (
        lambda u: [header(u, last_block_tokens=17)], InvalidRequest, r"a block has 1\.\.16 tokens, not 17"),
    "far too many tokens": (
        lambda u: [header(u, last_block_tokens=U32_MAX)], InvalidRequest, f"tokens, not {U32_MAX}"),
    "a shard outside the layout": (
        lambda u: [header(u, shard=types_pb2.Shard(layer_end=6, head_end=3))], InvalidRequest, "is not within 5"),
    "an empty shard": (lambda u: [header(u, shard=types_pb2.Shard())], InvalidRequest, r"shard layers 0\.\.0"),
    "a durability of the future": (
        lambda u: [header(u, durability=9)], InvalidRequest, "no durability has the number 9"),
    "a client that is not attached": (
        lambda u: [header(u, client_id=bytes(16))], UnknownClient, "no attached client has this id"),
    "no client": (lambda u: [header(u, client_id=b"")], UnknownClient, "no attached client has this id"),
}  # fmt: skip


@pytest.mark.parametrize("case", STREAMS)
def test_a_stream_that_is_no_save_is_refused(wire: Wire, upload: Upload, chain: BlockChain, case: str) -> None:
    messages, kind, message = STREAMS[case]
    with refused(kind, message):
        wire.save(messages(upload))
    assert wire.lookup(SMALL, chain).hit_blocks == 0


def test_a_refused_save_may_be_sent_again(daemon: DaemonProcess) -> None:
    with Wire(daemon.address) as wire:
        wire.attach()
        wire.open_layout(SMALL)
        chain = new_chain(SMALL, 2)
        upload = Upload.of(wire, SMALL, chain)
        with refused(IncompleteSave, "missing"):
            wire.save([upload.first, upload.last])
        assert wire.save(upload.messages()).stored == 2
        assert wire.has(SMALL, chain)


# Bytes that changed in transit


@pytest.mark.parametrize("durability", [types_pb2.DURABILITY_DRAM, types_pb2.DURABILITY_SSD])
def test_a_block_that_does_not_match_its_checksum_is_refused_and_the_others_are_stored(
    daemon: DaemonProcess, durability: types_pb2.Durability
) -> None:
    with Wire(daemon.address) as wire:
        wire.attach()
        wire.open_layout(SMALL)
        wire.admin.Discard(admin_pb2.DiscardRequest(everything=True))
        until(lambda: wire.state()["DRAM bytes"] == 0)  # A block stays until its running write to SSD has ended.
        chain = new_chain(SMALL, 3)
        upload = Upload.of(wire, SMALL, chain, durability)
        spoiled = next(frame for frame in upload.frames if (frame.layer, frame.first_block) == (4, 1))
        spoiled.payload = spoiled.payload[:-1] + bytes([spoiled.payload[-1] ^ 1])

        answer = wire.save(upload.messages())
        assert (answer.stored, answer.already_stored) == (2, 0)
        [refusal] = answer.refused
        assert (refusal.block, refusal.status.code) == (1, grpc.StatusCode.DATA_LOSS.value[0])
        assert refusal.status.message == "layer 4 of block 1 does not match its checksum"
        info = error_details_pb2.ErrorInfo()
        assert refusal.status.details[0].Unpack(info)
        assert (info.reason, info.domain, info.metadata["layer"]) == (UploadCorrupted.reason, "kvservice", "4")

        state = wire.state()
        assert (state["blocks"], state["uploads"]) == (2, 0)
        assert state["DRAM bytes"] == 2 * 16 * 1024
        assert wire.lookup(SMALL, chain, ttl_ms=0).hit_blocks == 1
        again = wire.save(Upload.of(wire, SMALL, chain).messages())
        assert again == pb.SaveBlocksResponse(stored=1, already_stored=2, stored_blocks=[1])
        assert wire.has(SMALL, chain)


# Saves that the client leaves


def test_a_save_whose_deadline_passes_leaves_nothing(wire: Wire, upload: Upload, chain: BlockChain) -> None:
    saving = wire.begin_save(Feed(*upload.messages()[:-1]), timeout_s=3)
    until(lambda: wire.status().uploads == 2)
    with pytest.raises(grpc.RpcError) as caught:
        saving.result()
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    until(lambda: wire.status().uploads == 0)
    assert wire.lookup(SMALL, chain).hit_blocks == 0


def test_a_save_that_its_client_cancels_leaves_nothing(wire: Wire, upload: Upload, chain: BlockChain) -> None:
    saving = wire.begin_save(Feed(*upload.messages()[:-1]))
    until(lambda: wire.status().uploads == 2)
    saving.cancel()
    until(lambda: wire.status().uploads == 0)
    assert wire.lookup(SMALL, chain).hit_blocks == 0


def test_a_save_ends_with_the_attachment_of_its_client(
    wire: Wire, upload: Upload, chain: BlockChain, daemon: DaemonProcess
) -> None:
    messages = upload.messages()
    with Wire(daemon.address) as other:
        other.attach()
        feed = Feed(header(upload, client_id=other.client_id), messages[1])
        saving = wire.begin_save(feed)
        until(lambda: wire.status().uploads == 2)
    until(lambda: wire.status().uploads == 0)
    feed.send(*messages[2:])
    feed.end()
    with refused(IncompleteSave, "its client has disconnected|the client has disconnected"):
        saving.result()
    assert wire.lookup(SMALL, chain).hit_blocks == 0


def test_of_a_save_with_spoiled_bytes_nothing_is_kept(wire: Wire, upload: Upload, chain: BlockChain) -> None:
    """Every message of a save, spoiled at many places."""
    for place, message in itertools.product(range(3), upload.messages()):
        spoiled = bytearray(message[:200])
        spoiled[len(spoiled) * place // 3] ^= 0xFF
        for messages in ([bytes(spoiled)], [upload.first, bytes(spoiled), upload.last]):
            with pytest.raises(grpc.RpcError) as caught:
                wire.save(messages)
            assert caught.value.code() in (
                grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION
            ), caught.value  # fmt: skip
    assert wire.lookup(SMALL, chain).hit_blocks == 0
