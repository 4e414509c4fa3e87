"""Frames: golden bytes, protobuf's own reading of them, and the errors for invalid frames."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
from google.protobuf.message import DecodeError
from hypothesis import example, given
from hypothesis import strategies as st

from kvservice_api.errors import InvalidFrame
from kvservice_api.frames import HEAD_BYTES_MAX, Frame, decode_frame, decode_save, encode_frame
from kvservice_api.v1 import blocks_pb2 as pb
from tests.wire.vectors import golden

FRAMES = golden("frames")

u32s = st.integers(0, 2**32 - 1)
u64s = st.integers(0, 2**64 - 1)
frames = st.builds(Frame, u32s, u32s, u64s, st.binary(max_size=300).map(memoryview))


def encoded(frame: Frame) -> bytes:
    return encode_frame(frame.layer, frame.first_block, frame.first_offset_bytes, [frame.payload])


def as_protobuf_reads(data: bytes) -> Frame:
    message = pb.SaveBlocksRequest.FromString(data)
    return Frame(message.layer, message.first_block, message.first_offset_bytes, memoryview(message.payload))


def varint(value: int) -> bytes:
    low, rest = value & 0x7F, value >> 7
    return bytes([low | 0x80]) + varint(rest) if rest else bytes([low])


@pytest.mark.parametrize("vector", FRAMES)
def test_frames_are_the_golden_ones(vector: dict[str, Any]) -> None:
    numbers = vector["layer"], vector["first_block"], vector["first_offset_bytes"]
    payload = bytes.fromhex(vector["payload"])
    by_hand = b"".join(bytes([8 * (n + 1)]) + varint(value) for n, value in enumerate(numbers) if value)
    by_hand += b"\x7a" + varint(len(payload)) + payload if payload else b""

    assert encode_frame(*numbers, [payload]).hex() == by_hand.hex() == vector["encoded"]
    assert decode_frame(by_hand) == Frame(*numbers, memoryview(payload))


@pytest.mark.parametrize("kind", [pb.LoadBlocksResponse, pb.SaveBlocksRequest])
@pytest.mark.parametrize("vector", FRAMES)
def test_plain_protobuf_classes_read_and_write_the_same_bytes(
    vector: dict[str, Any], kind: type[pb.LoadBlocksResponse | pb.SaveBlocksRequest]
) -> None:
    data = bytes.fromhex(vector["encoded"])
    message = kind.FromString(data)

    assert message.payload.hex() == vector["payload"]
    assert (message.layer, message.first_block, message.first_offset_bytes) == (
        vector["layer"],
        vector["first_block"],
        vector["first_offset_bytes"],
    )
    assert message.SerializeToString() == data


@given(frames, st.lists(st.integers(0, 300), max_size=5))
def test_a_frame_is_read_back_however_its_payload_was_cut(frame: Frame, cuts: list[int]) -> None:
    ends = [*sorted(cuts), len(frame.payload)]
    pieces = [frame.payload[start:end] for start, end in zip([0, *ends], ends, strict=False)]

    data = encode_frame(frame.layer, frame.first_block, frame.first_offset_bytes, pieces)

    assert decode_frame(data) == decode_save(data) == as_protobuf_reads(data) == frame
    assert len(data) <= HEAD_BYTES_MAX + len(frame.payload)


def test_a_payload_is_borrowed_and_not_copied() -> None:
    data = encode_frame(1, 2, 3, [b"payload"])

    assert decode_frame(data).payload.obj is data


@given(frames, st.permutations(range(4)), st.lists(st.integers(0, 3), max_size=3))
def test_fields_in_any_order_and_given_twice_mean_what_protobuf_says(
    frame: Frame, order: list[int], again: list[int]
) -> None:
    fields = [
        pb.SaveBlocksRequest(layer=frame.layer).SerializeToString(),
        pb.SaveBlocksRequest(first_block=frame.first_block).SerializeToString(),
        pb.SaveBlocksRequest(first_offset_bytes=frame.first_offset_bytes).SerializeToString(),
        pb.SaveBlocksRequest(payload=bytes(frame.payload)).SerializeToString(),
    ]
    data = b"".join(fields[number] for number in [*again, *order])

    assert decode_frame(data) == frame


@given(frames)
def test_fields_of_a_later_version_are_passed_over(frame: Frame) -> None:
    unknown = b"\x72\x03new"  # Field 14, three bytes.

    assert decode_frame(unknown + encoded(frame)) == frame
    assert decode_frame(encoded(frame) + unknown) == frame


@given(frames, st.data())
def test_a_cut_off_frame_is_refused_or_is_what_protobuf_makes_of_it(frame: Frame, data: st.DataObject) -> None:
    whole = encoded(frame)
    part = whole[: data.draw(st.integers(0, max(len(whole) - 1, 0)))]
    payload_starts = len(whole) - len(frame.payload)

    if len(part) >= payload_starts and len(part) < len(whole):
        with pytest.raises(InvalidFrame):
            decode_frame(part)
    else:
        assert_read_as_protobuf_does(part)


@given(st.binary(max_size=60) | st.builds(lambda head, frame: head + encoded(frame), st.binary(max_size=20), frames))
@example(b"\x08" + b"\xff" * 9 + b"\x01")  # A varint over 32 bits.
@example(b"\x18" + b"\xff" * 9 + b"\x7f\x7a\x01x")  # One over 64 bits.
@example(b"\x18" + b"\x80" * 10 + b"\x01")  # One of eleven bytes.
@example(b"\x7a\x80\x00")  # A length of more bytes than it needs.
@example(b"\x7a" + b"\xff" * 9 + b"\x01")  # A payload of 2**64 - 1 bytes.
@example(b"\x0a\x01x\x7a\x01y")  # `layer` with the wrong wire type.
@example(b"\x08\x01\x7a\x00")
def test_any_bytes_are_read_as_protobuf_reads_them(data: bytes) -> None:
    assert_read_as_protobuf_does(data)


def assert_read_as_protobuf_does(data: bytes) -> None:
    try:
        expected = as_protobuf_reads(data)
    except DecodeError:
        with pytest.raises(InvalidFrame):
            decode_frame(data)
    else:
        assert decode_frame(data) == expected


class TestSaveStream:
    def test_header_frame_and_commit_are_distinguished(self) -> None:
        header = pb.SaveHeader(client_id=b"c" * 16, keys=b"k" * 32)
        commit = pb.SaveCommit(checksums=b"s" * 8)

        assert decode_save(pb.SaveBlocksRequest(header=header).SerializeToString()) == header
        assert decode_save(pb.SaveBlocksRequest(commit=commit).SerializeToString()) == commit
        assert decode_save(pb.SaveBlocksRequest(payload=b"x").SerializeToString()) == Frame(0, 0, 0, memoryview(b"x"))

    @pytest.mark.parametrize(
        "message",
        [
            pb.SaveBlocksRequest(header=pb.SaveHeader(), payload=b"x"),
            pb.SaveBlocksRequest(header=pb.SaveHeader(), commit=pb.SaveCommit()),
            pb.SaveBlocksRequest(commit=pb.SaveCommit(), layer=1),
            pb.SaveBlocksRequest(header=pb.SaveHeader(), commit=pb.SaveCommit(), payload=b"x"),
        ],
    )
    def test_a_message_that_carries_two_things_is_refused(self, message: pb.SaveBlocksRequest) -> None:
        with pytest.raises(InvalidFrame):
            decode_save(message.SerializeToString())

    @given(st.binary(max_size=60))
    def test_any_bytes_are_something_or_refused(self, data: bytes) -> None:
        with suppress(InvalidFrame):
            decode_save(data)
