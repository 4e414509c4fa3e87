"""The client's end of the bulk port, against a daemon that misbehaves on demand."""

from __future__ import annotations

import gc
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvservice_api.bulk import MessageKind, pack_header
from kvservice_api.errors import (
    BulkUnavailable,
    Cancelled,
    ChecksumMismatch,
    DeadlineExceeded,
    InvalidFrame,
    TransferEnded,
)
from kvservice_client.buffers import Bytes
from kvservice_client.retry import Deadline, TransferDeadline, Watchdog
from kvservice_client.transports import bulk, bulk_transfer
from kvservice_client.transports.base import LoadOrder, Mismatch, NotCarried
from kvservice_client.transports.bulk import BulkTransport
from tests.bulk_daemon import BulkDaemon, error_bytes, send
from tests.bulk_orders import LARGE, ODD, TINY, Large, checksums_of, content, order_of, save_order, units_of, whole
from tests.clock import ClientClock
from tests.collections import without_collections
from tests.daemon import NEVER_S, SOON_S, until


class CountingDeadline(TransferDeadline):
    """Its time stands still. Counts its answers that begin."""

    def __init__(self, layer_s: float, idle_s: float) -> None:
        clock = ClientClock()
        super().__init__(layer_s, clock, Watchdog(clock), idle_s)
        self._changed = threading.Condition()
        self.begun = 0

    def begin_answer(self) -> None:
        super().begin_answer()
        with self._changed:
            self.begun += 1
            self._changed.notify_all()

    def begins_again(self, before: int) -> bool:
        """Whether it does in time."""
        with self._changed:
            return self._changed.wait_for(lambda: self.begun > before, 5.0)


def hold(released: threading.Event, number: int) -> Callable[[int, socket.socket], None]:
    """From unit `number` on, the daemon sends nothing until it is released."""
    return lambda unit, connection: None if unit < number else (released.wait(SOON_S), None)[1]


class TestALoad:
    @settings(max_examples=25, deadline=None)
    @given(data=st.data())
    def test_of_any_blocks_in_any_units_on_any_connections_is_bit_for_bit(self, data: st.DataObject) -> None:
        layout = data.draw(st.sampled_from([TINY, ODD, LARGE]))
        blocks = data.draw(st.integers(1, 4 if layout is LARGE else 40))
        counts = [layout.block_tokens] * (blocks - 1) + [data.draw(st.integers(1, layout.block_tokens))]
        first_layer = data.draw(st.integers(0, layout.layers - 1))
        order = order_of(layout, counts, into=data.draw(st.booleans()), first_layer=first_layer)
        layers, count = content(order), data.draw(st.integers(1, 4))
        units = units_of(order, layers, data.draw(st.integers(1, 3 * blocks)))
        with BulkDaemon(units) as daemon, pytest.MonkeyPatch.context() as patch:
            if data.draw(st.booleans()):
                daemon.checksums = checksums_of(order, units)
            patch.setattr(bulk_transfer, "_connections", lambda size_bytes, rtt_s, with_tls: count)
            patch.setattr(bulk_transfer, "_FAR_RTT_S", data.draw(st.sampled_from([0.0, 1.0])))
            transport = BulkTransport(daemon.connection())
            loaded = list(transport.load(order, whole()))
            transport.close()
        assert all(map(np.array_equal, loaded, layers[first_layer:])) and len(loaded) == layout.layers - first_layer

    def test_after_another_uses_its_connections_again(self, large: Large, connections: int) -> None:
        daemon, transport, order, layers = large
        for _ in range(3):
            assert all(map(np.array_equal, transport.load(order, whole()), layers))
        assert daemon.accepted == connections

    def test_gives_its_first_layer_before_the_daemon_has_the_second(self, large: Large) -> None:
        daemon, transport, order, layers = large
        released = threading.Event()
        daemon.before_unit = hold(released, 4)
        load = transport.load(order, whole())
        assert np.array_equal(next(load), layers[0])
        released.set()
        assert all(map(np.array_equal, load, layers[1:]))

    def test_whose_connection_breaks_is_left_to_the_next_transport(self, large: Large) -> None:
        daemon, transport, order, _ = large
        daemon.before_unit = lambda unit, connection: daemon.drop_connections() if unit == 10 else None
        with pytest.raises(NotCarried, match="broke"):
            list(transport.load(order, whole()))

    def test_of_a_damaged_block_raises_what_the_daemon_says(self, large: Large) -> None:
        daemon, transport, order, _ = large

        def damaged(unit: int, connection: socket.socket) -> None:
            if unit == 10:
                send(connection, MessageKind.ERROR, error_bytes(ChecksumMismatch("bad", block="2")))

        daemon.before_unit = damaged
        with pytest.raises(ChecksumMismatch) as caught:
            list(transport.load(order, whole()))
        assert caught.value.details["block"] == "2"

    def test_of_bytes_that_are_not_the_stored_ones_is_left_to_the_next_transport(self, large: Large) -> None:
        daemon, transport, order, layers = large
        daemon.checksums = checksums_of(order, daemon.units)
        layer, block, data = daemon.units[10]
        daemon.units[10] = layer, block, data[:-1] + bytes([data[-1] ^ 1])
        loaded: list[Bytes] = []
        with pytest.raises(Mismatch, match=f"layer {layer}"):
            loaded.extend(transport.load(order, whole()))
        assert len(loaded) <= layer and all(map(np.array_equal, loaded, layers))

    @pytest.mark.parametrize(
        "checksums", [bytes(16), bytes(8 * 5), bytes(9)], ids=["of two slices", "of too many", "of half a checksum"]
    )
    def test_does_not_take_checksums_of_other_slices(self, large: Large, checksums: bytes) -> None:
        daemon, transport, order, _ = large
        daemon.checksums = {10: checksums}
        with pytest.raises(InvalidFrame, match="checksums"):
            list(transport.load(order, whole()))

    def test_with_a_ticket_that_is_not_known_is_left_to_the_next_transport(self, large: Large) -> None:
        daemon, transport, order, _ = large
        daemon.forgets_tickets = True
        with pytest.raises((TransferEnded, NotCarried)):
            list(transport.load(order, whole()))

    @pytest.mark.parametrize(
        ("kind", "fields", "size"),
        [
            (MessageKind.DATA, {"layer": 9}, 8),
            (MessageKind.DATA, {"first_block": 4}, 8),
            (MessageKind.DATA, {"offset_bytes": 2**40}, 8),
            (MessageKind.DATA, {"layer": 0, "first_block": 0}, 8),  # It came before.
            (MessageKind.DATA, {}, 0),
            (MessageKind.RESULT, {}, 8),
            (MessageKind.ERROR, {}, 8),  # No status.
            (MessageKind.SUMMED_DATA, {"layer": 5, "offset_bytes": 8}, 8),  # Checksums of nothing.
            (MessageKind.SUMMED_DATA, {"layer": 5, "offset_bytes": 2**40}, 8),
            (MessageKind.SUMMED_DATA, {"layer": 5, "offset_bytes": 8}, 100),  # Of a part of a slice.
            (MessageKind.DATA, {"layer": 4}, 2 * 6 * 2**20 + 1),  # More than there is in the last layers.
        ],
    )
    def test_does_not_take_bytes_for_places_that_it_does_not_have(
        self, large: Large, kind: MessageKind, fields: dict[str, int], size: int
    ) -> None:
        daemon, transport, order, _ = large
        daemon.before_unit = lambda unit, connection: (
            send(connection, kind, bytes(size), **fields) if unit == 9 else None
        )
        with pytest.raises(InvalidFrame):
            list(transport.load(order, whole()))

    @pytest.mark.parametrize("connections", [1], ids=["one connection"], indirect=True)
    def test_does_not_wait_for_itself_when_a_layer_comes_long_before_its_turn(
        self, connections: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        order = order_of(LARGE, [512] * 4, into=False)
        monkeypatch.setattr(bulk, "_AHEAD_BYTES", order.block_starts(0)[-1])
        raised: list[BaseException] = []

        def load() -> None:
            with pytest.raises(InvalidFrame, match="layer 5 arrived while layer 0") as caught:
                list(transport.load(order, whole()))
            raised.append(caught.value)

        with BulkDaemon(units_of(order, content(order))[-1:]) as daemon:
            transport = BulkTransport(daemon.connection())
            thread = threading.Thread(target=load, daemon=True)
            thread.start()
            thread.join(SOON_S)
            assert raised


class TestTheEndOfALoad:
    @pytest.fixture
    def held(self, large: Large) -> Iterator[Large]:
        """The daemon sends one layer, and of the next one nothing."""
        released = threading.Event()
        large[0].before_unit = hold(released, 4)
        yield large
        released.set()

    def check_nothing_runs(self) -> None:
        """No thread is left that could write into the caller's buffers."""
        assert not [each for each in threading.enumerate() if each.name == "kvservice-bulk"]

    def test_comes_with_its_time(self, held: Large) -> None:
        _, transport, order, layers = held
        load = transport.load(order, TransferDeadline(0.3, Deadline(1).clock))
        assert np.array_equal(next(load), layers[0])
        with pytest.raises(DeadlineExceeded, match="allowed for this call"):
            next(load)
        self.check_nothing_runs()

    @pytest.mark.parametrize(("layer_s", "idle_s", "match"), [(0.1, None, "layer"), (NEVER_S, 0.1, "sent nothing")])
    def test_comes_with_the_time_of_a_layer(
        self, held: Large, layer_s: float, idle_s: float | None, match: str
    ) -> None:
        _, transport, order, layers = held
        client: Any = transport._connection
        deadline = TransferDeadline(layer_s, client.clock, client.watchdog, idle_s)
        load = transport.load(order, deadline)
        with deadline.layer(NEVER_S):
            assert np.array_equal(next(load), layers[0])
        with deadline.layer(), pytest.raises(DeadlineExceeded, match=match):
            next(load)
        self.check_nothing_runs()

    def test_comes_when_the_garbage_collector_drops_it_on_one_of_its_own_threads(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(bulk_transfer, "_connections", lambda size_bytes, rtt_s, with_tls: 2)
        is_dropped, is_collected = threading.Event(), threading.Event()

        class Collecting(LoadOrder):
            def buffer(self, layer: int) -> Bytes:
                if layer >= 2:
                    gc.collect()
                    is_collected.set()
                return super().buffer(layer)

        plain = order_of(LARGE, [512] * 4, into=False)
        units = units_of(plain, content(plain))

        def hold_back(number: int, connection: socket.socket) -> None:
            if units[number][0] >= 2:
                is_dropped.wait(SOON_S)

        with BulkDaemon(units) as daemon, without_collections():
            daemon.before_unit = hold_back
            transport = BulkTransport(daemon.connection())
            order = Collecting(**{each.name: getattr(plain, each.name) for each in fields(plain)})
            cycle: list[object] = [load := transport.load(order, whole())]
            next(load)
            next(load)
            cycle.append(cycle)
            del cycle, load
            is_dropped.set()
            assert is_collected.wait(SOON_S)
            until(lambda: not any(each.name.startswith("kvservice-bulk") for each in threading.enumerate()))
            transport.close()

    def test_comes_when_the_garbage_collector_drops_it_while_its_own_threads_wait_for_the_collecting_one(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(bulk_transfer, "_connections", lambda size_bytes, rtt_s, with_tls: 2)
        order = order_of(LARGE, [512] * 4)
        units = units_of(order, content(order))
        released = threading.Event()

        def waits() -> bool:
            return any(frame.f_code.co_name == "keep" for frame in sys._current_frames().values())

        def drop(cycle: list[object]) -> None:
            with transport._pool._lock:  # As while another load takes a connection, which may run the collector.
                released.set()
                until(waits)
                cycle.clear()
                gc.collect()

        with BulkDaemon(units) as daemon, without_collections():
            daemon.before_unit = hold(released, 12)
            transport = BulkTransport(daemon.connection())
            cycle: list[object] = [load := transport.load(order, whole())]
            next(load)
            next(load)
            cycle.append(cycle)
            dropping = threading.Thread(target=drop, args=([cycle],), daemon=True)
            del cycle, load
            dropping.start()
            dropping.join(SOON_S)
            assert not dropping.is_alive()
            until(lambda: not any(each.name.startswith("kvservice-bulk") for each in threading.enumerate()))
            transport.close()

    def test_is_put_off_by_each_part_of_a_slice_that_arrives(self, large: Large) -> None:
        daemon, transport, order, layers = large
        deadline = CountingDeadline(NEVER_S, idle_s=0.4)
        were_noted = []

        def in_parts(unit: int, connection: socket.socket) -> None:
            if unit == 11:  # The last one of the third layer.
                layer, first_block, data = daemon.units[unit]
                connection.sendall(pack_header(MessageKind.DATA, len(data), layer=layer, first_block=first_block))
                for begin in range(0, len(data), len(data) // 4):
                    before = deadline.begun
                    connection.sendall(data[begin : begin + len(data) // 4])
                    were_noted.append(deadline.begins_again(before))
                raise IndexError  # The connection ends: the unit was sent.

        daemon.before_unit = in_parts
        load = transport.load(order, deadline)
        for expected in layers[:3]:
            with deadline.layer():
                assert np.array_equal(next(load), expected)
        load.close()
        assert were_noted[:3] == [True] * 3

    def test_comes_with_cancel_from_another_thread(self, held: Large) -> None:
        _, transport, order, _ = held
        deadline = whole()
        load = transport.load(order, deadline)
        next(load)
        canceller = threading.Timer(0.1, lambda: deadline.cancel(Cancelled("enough")))
        canceller.start()
        begin_s = time.monotonic()
        with pytest.raises(Cancelled):
            next(load)
        assert time.monotonic() - begin_s < SOON_S
        self.check_nothing_runs()

    def test_comes_when_it_is_closed(self, held: Large) -> None:
        _, transport, order, _ = held
        load = transport.load(order, whole())
        next(load)
        load.close()
        self.check_nothing_runs()

    def test_comes_when_the_client_is_closed(self, held: Large) -> None:
        _, transport, order, _ = held
        load = transport.load(order, whole())
        next(load)
        transport.close()
        with pytest.raises(NotCarried):
            next(load)
        self.check_nothing_runs()
        with pytest.raises(BulkUnavailable, match="closed"):
            next(transport.load(order, whole()))

    def test_comes_when_a_connection_broke_within_its_first_message(self, large: Large, connections: int) -> None:
        if connections == 1:
            pytest.skip("there is no other connection")
        daemon, transport, order, _ = large
        first: list[socket.socket] = []
        has_broken = threading.Event()

        def broken(unit: int, connection: socket.socket) -> None:
            first.append(connection)
            if connection is first[0]:
                _ = unit < 6 or has_broken.wait(SOON_S)
                return
            layer, first_block, data = daemon.units[unit]
            connection.sendall(pack_header(MessageKind.DATA, len(data), layer=layer, first_block=first_block) + b"a")
            connection.shutdown(socket.SHUT_RDWR)
            has_broken.set()
            raise IndexError

        daemon.before_unit = broken
        with pytest.raises(NotCarried):
            list(transport.load(order, whole()))
        self.check_nothing_runs()

    def test_comes_when_no_thread_can_be_started(self, large: Large, connections: int) -> None:
        _, transport, order, layers = large
        real = threading.Thread.start

        def start(thread: threading.Thread) -> None:
            if thread.name == "kvservice-bulk":
                raise RuntimeError("can't start new thread")
            real(thread)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(threading.Thread, "start", start)
            if connections == 1:
                assert all(map(np.array_equal, transport.load(order, whole()), layers))
            else:
                with pytest.raises(NotCarried, match="no thread"):
                    list(transport.load(order, whole()))

    def test_comes_with_a_signal_while_a_thread_starts(self, large: Large, connections: int) -> None:
        if connections == 1:
            pytest.skip("it needs no thread")
        _, transport, order, _ = large
        real = threading.Thread.start

        def start(thread: threading.Thread) -> None:
            real(thread)
            if thread.name == "kvservice-bulk":
                raise KeyboardInterrupt

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(threading.Thread, "start", start)
            with pytest.raises(KeyboardInterrupt):
                list(transport.load(order, whole()))
        self.check_nothing_runs()

    def test_a_deadline_that_has_passed_does_not_open_a_transfer(self, large: Large) -> None:
        daemon, transport, order, _ = large
        with pytest.raises(DeadlineExceeded):
            next(transport.load(order, whole(0)))
        assert not daemon.opened


class TestASave:
    @settings(max_examples=25, deadline=None)
    @given(data=st.data())
    def test_of_any_blocks_on_any_connections_stores_every_byte(self, data: st.DataObject) -> None:
        layout = data.draw(st.sampled_from([TINY, ODD, LARGE]))
        blocks = data.draw(st.integers(1, 4 if layout is LARGE else 40))
        counts = [layout.block_tokens] * (blocks - 1) + [data.draw(st.integers(1, layout.block_tokens))]
        wanted = sorted(data.draw(st.sets(st.integers(0, blocks - 1))))
        count = data.draw(st.integers(1, 4))
        order = save_order(layout, counts)
        with BulkDaemon() as daemon, pytest.MonkeyPatch.context() as patch:
            patch.setattr(bulk_transfer, "_connections", lambda size_bytes, rtt_s, with_tls: count)
            daemon.wanted = wanted
            daemon.slices = [[bytearray(each.size) for each in slices] for slices in order.layers]
            transport = BulkTransport(daemon.connection())
            results, sent_bytes = transport.save(order, Deadline(SOON_S))
            transport.close()
        assert results[0].stored == len(wanted)
        assert sent_bytes == sum(slices[block].size for slices in order.layers for block in wanted)
        for slices, arrived in zip(order.layers, daemon.slices, strict=True):
            for block, piece in enumerate(slices):
                assert bytes(arrived[block]) == (piece.tobytes() if block in wanted else bytes(piece.size))

    def test_of_which_the_daemon_wants_a_block_that_it_does_not_have_is_refused(self) -> None:
        with BulkDaemon() as daemon:
            daemon.wanted = [0, 2]
            with pytest.raises(InvalidFrame, match="block 2"):
                BulkTransport(daemon.connection()).save(save_order(TINY, [4, 4]), Deadline(SOON_S))

    def test_of_which_nothing_is_wanted_uses_one_connection(self, connections: int) -> None:
        order = save_order(LARGE, [512] * 4)
        with BulkDaemon() as daemon, pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                bulk_transfer, "_connections", lambda size_bytes, rtt_s, with_tls: connections if size_bytes else 1
            )
            daemon.slices = [[bytearray(each.size) for each in slices] for slices in order.layers]
            transport = BulkTransport(daemon.connection())
            assert transport.save(order, Deadline(SOON_S))[1] == 0
            transport.close()
            assert daemon.accepted == 1

    def test_whose_connections_break_is_left_to_the_next_transport(self, connections: int) -> None:
        order = save_order(LARGE, [512] * 4)
        with BulkDaemon() as daemon:
            daemon.wanted, daemon.slices = [0, 1, 2, 3], []  # It does not know where to put them.
            transport = BulkTransport(daemon.connection())
            with pytest.raises(NotCarried):
                transport.save(order, Deadline(SOON_S))
            transport.close()
