"""Buffers that sockets fill and send, with their checksums: by the C extension, and by Python."""

from __future__ import annotations

import os
import signal
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import suppress

import numpy as np
import pytest
import xxhash

from kvservice_api import copying
from kvservice_api.socket_buffers import BLOCKED, ENDED, MOVED, SocketBuffers

SIZES = [1, 24, 0, 240, 241, 1023, 1024, 1025, 0, 5000, (128 << 10) - 7, 128 << 10, 300_001, (1 << 20) + 13, 0]
TURN = 1 << 20
LONG_S = 30.0

pytestmark = pytest.mark.usefixtures("implementation")


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    near, far = socket.socketpair()
    with near, far:
        yield near, far


@pytest.fixture
def watched() -> Iterator[int]:
    """A descriptor that is not readable until it is written."""
    descriptor = os.eventfd(0)
    yield descriptor
    os.close(descriptor)


def random_bytes(size: int) -> bytes:
    return np.random.default_rng(size).bytes(size)


def views(data: bytes | bytearray, sizes: list[int]) -> list[memoryview]:
    ends = np.cumsum(sizes).tolist()
    return [memoryview(data)[end - size : end] for size, end in zip(sizes, ends, strict=True)]


def sums(parts: list[memoryview]) -> list[int]:
    return [xxhash.xxh3_64_intdigest(each) for each in parts]


def all_of(data: SocketBuffers, one: socket.socket, *, is_sending: bool = False, watched: int = -1) -> int:
    moved = 0
    while not data.is_done:
        why, count = (data.send if is_sending else data.receive)(one, TURN, LONG_S, watched)
        assert why != ENDED
        moved += count
    return moved


@pytest.mark.parametrize("is_watched", [False, True])
@pytest.mark.parametrize(("is_summed", "is_streamed"), [(False, False), (True, False), (True, True)])
def test_what_is_sent_is_received_with_the_checksum_of_each_buffer(
    pair: tuple[socket.socket, socket.socket], watched: int, is_watched: bool, is_summed: bool, is_streamed: bool
) -> None:
    near, far = pair
    near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 64 << 10)
    data, into = random_bytes(sum(SIZES)), bytearray(sum(SIZES))
    sent = SocketBuffers(views(data, SIZES), summed=is_summed)
    received = SocketBuffers(views(into, SIZES), summed=is_summed, streamed=is_streamed)
    other = watched if is_watched else -1
    sender = threading.Thread(target=all_of, args=(sent, near), kwargs={"is_sending": True, "watched": other})
    sender.start()
    assert all_of(received, far, watched=other) == len(data)
    sender.join()
    assert into == data
    expected = sums(views(data, SIZES)) if is_summed else []
    assert sent.sums.tolist() == received.sums.tolist() == expected


@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize(
    "sizes", [(1, 63, 959, 1, 1024, 1025, 240, 5000, 20_000), (20_000,), (8192, 4096, 7000, 20_000)]
)
def test_a_buffer_that_comes_in_small_parts_has_its_checksum(
    pair: tuple[socket.socket, socket.socket], watched: int, sizes: tuple[int, ...], is_streamed: bool
) -> None:
    data, into = random_bytes(20_000), bytearray(20_000)
    received = SocketBuffers([memoryview(into)], summed=True, streamed=is_streamed)
    rest, moved = data, 0
    for size in (*sizes, len(data)):
        part, rest = rest[:size], rest[size:]
        pair[0].sendall(part)
        while moved < len(data) - len(rest):
            moved += received.receive(pair[1], TURN, 0.0, watched)[1]
    assert received.is_done and into == data
    assert received.sums.tolist() == [xxhash.xxh3_64_intdigest(data)]


@pytest.mark.parametrize("is_streamed", [False, True])
def test_what_follows_the_last_buffer_stays_in_the_socket(
    pair: tuple[socket.socket, socket.socket], is_streamed: bool
) -> None:
    data, into = random_bytes(3000), bytearray(2100)
    pair[0].sendall(data)
    received = SocketBuffers(views(into, [2000, 100]), summed=True, streamed=is_streamed)
    all_of(received, pair[1])
    assert into == data[:2100] and pair[1].recv(2000) == data[2100:]


def test_many_buffers_of_a_byte_are_moved(pair: tuple[socket.socket, socket.socket]) -> None:
    data, into = random_bytes(3000), bytearray(3000)
    sent = SocketBuffers(views(data, [1] * 3000), summed=True)
    received = SocketBuffers(views(into, [1] * 3000), summed=True)
    sender = threading.Thread(target=all_of, args=(sent, pair[0]), kwargs={"is_sending": True})
    sender.start()
    all_of(received, pair[1])
    sender.join()
    assert into == data and sent.sums == received.sums == received.sums.__class__("Q", sums(views(data, [1] * 3000)))


def test_nothing_to_receive_blocks_and_an_end_is_seen(pair: tuple[socket.socket, socket.socket], watched: int) -> None:
    received = SocketBuffers([memoryview(bytearray(100))])
    assert received.receive(pair[1], TURN, 0.0, watched) == (BLOCKED, 0)
    pair[0].sendall(b"some")
    assert received.receive(pair[1], TURN, 0.0, watched)[1] == 4
    pair[0].close()
    assert received.receive(pair[1], TURN, 0.0, watched) == (ENDED, 0)


def test_the_time_limit_of_a_socket_ends_a_wait_with_what_has_come(pair: tuple[socket.socket, socket.socket]) -> None:
    pair[1].setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("@ll", 0, 1000))
    received = SocketBuffers([memoryview(bytearray(100))])
    assert received.receive(pair[1], TURN, LONG_S) == (BLOCKED, 0)
    pair[0].sendall(b"some")
    assert received.receive(pair[1], TURN, LONG_S)[1] == 4
    assert not received.is_done


def test_a_send_that_nothing_reads_ends_at_its_time(pair: tuple[socket.socket, socket.socket]) -> None:
    data = random_bytes(4 << 20)
    pair[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@ll", 0, 1000))
    sent = SocketBuffers([memoryview(data)], summed=True)
    while sent.send(pair[0], TURN, 1e-3)[1]:
        pass
    assert not sent.is_done
    received = SocketBuffers([memoryview(bytearray(len(data)))], summed=True)
    reader = threading.Thread(target=all_of, args=(received, pair[1]))
    reader.start()
    all_of(sent, pair[0], is_sending=True)
    reader.join()
    assert sent.sums == received.sums and sent.sums.tolist() == sums([memoryview(data)])


def test_a_send_that_waits_ends_when_its_socket_is_shut_down(pair: tuple[socket.socket, socket.socket]) -> None:
    sent = SocketBuffers([memoryview(bytes(4 << 20))], summed=True)
    ending = threading.Timer(0.02, pair[0].shutdown, (socket.SHUT_RDWR,))
    ending.start()
    with pytest.raises(BrokenPipeError):
        all_of(sent, pair[0], is_sending=True)
    ending.join()


def test_a_readable_descriptor_ends_a_turn_and_a_wait(
    pair: tuple[socket.socket, socket.socket], watched: int, implementation: str
) -> None:
    received = SocketBuffers([memoryview(bytearray(4 << 20))])
    sender = threading.Thread(target=pair[0].sendall, args=(bytes(1 << 20),))
    sender.start()
    os.eventfd_write(watched, 1)
    total = 0
    while total < 1 << 20:
        why, count = received.receive(pair[1], 1, LONG_S, watched)
        total += count
        assert why in (MOVED, BLOCKED) and count <= 512 << 10
    sender.join()
    assert received.receive(pair[1], TURN, LONG_S, watched) == (BLOCKED, 0)


def test_a_wait_ends_when_another_thread_writes_the_descriptor(
    pair: tuple[socket.socket, socket.socket], watched: int, implementation: str
) -> None:
    waker = threading.Timer(0.02, os.eventfd_write, (watched, 1))
    waker.start()
    started_s = time.monotonic()
    received = SocketBuffers([memoryview(bytearray(100))])
    assert received.receive(pair[1], TURN, LONG_S, watched) == (BLOCKED, 0)
    assert time.monotonic() - started_s < LONG_S / 2
    waker.join()


def test_a_broken_connection_raises(pair: tuple[socket.socket, socket.socket], watched: int) -> None:
    pair[1].close()
    sent = SocketBuffers([memoryview(bytes(100))])
    with pytest.raises(BrokenPipeError):
        sent.send(pair[0], TURN, LONG_S, watched)
    pair[0].close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        sent.send(pair[0], TURN, LONG_S, watched)


def test_a_signal_handler_runs_while_a_thread_waits(pair: tuple[socket.socket, socket.socket]) -> None:
    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGUSR1, interrupt)
    timer = threading.Timer(0.02, os.kill, (os.getpid(), signal.SIGUSR1))
    timer.start()
    received = SocketBuffers([memoryview(bytearray(100))])
    pair[1].setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("@ll", 10, 0))
    try:
        with pytest.raises(KeyboardInterrupt):
            all_of(received, pair[1])
    finally:
        timer.join()
        signal.signal(signal.SIGUSR1, before)


def test_read_only_memory_is_not_filled(pair: tuple[socket.socket, socket.socket]) -> None:
    pair[0].sendall(b"some")
    kept = bytes(4)
    with pytest.raises((BufferError, TypeError)):
        SocketBuffers([memoryview(kept)]).receive(pair[1], TURN, LONG_S)
    assert kept == bytes(4)


@pytest.mark.parametrize(
    "changed",
    [
        {"first": -1},
        {"first": 3},
        {"offset": -1},
        {"offset": 8},
        {"sums": bytearray(8)},
        {"partial": bytearray(71)},
        {"offset": 4, "partial": bytearray(64) + (1024).to_bytes(8, "little")},
        {"offset": 4, "partial": bytearray(64) + (3).to_bytes(8, "little")},
    ],
)
def test_the_extension_refuses_what_is_outside_its_buffers(
    pair: tuple[socket.socket, socket.socket], implementation: str, changed: dict[str, object]
) -> None:
    if copying.native is None:
        pytest.skip("only the extension takes tables")
    given = {"first": 0, "offset": 0, "sums": bytearray(16), "partial": bytearray(72)} | changed
    buffers = [bytearray(8), bytearray(8)]
    pair[0].sendall(bytes(16))
    with pytest.raises(ValueError, match=r"buffer|checksum"):
        copying.native.move_buffers(
            pair[1].fileno(),
            -1,
            False,
            buffers,
            given["first"],
            given["offset"],
            given["sums"],
            given["partial"],
            False,
            1,
            1.0,
        )
    with suppress(BlockingIOError):
        assert len(pair[1].recv(100, socket.MSG_DONTWAIT)) == 16
