"""HintService: `Exchange`, without the client library, and with clients that mean no good."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from queue import SimpleQueue
from typing import Any

import grpc
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvservice_api.errors import InvalidRequest, UnknownClient
from kvservice_api.keys import BlockChain
from kvservice_api.v1 import hints_pb2 as pb
from kvservice_api.v1 import types_pb2
from tests.daemon import SOON_S, DaemonProcess, until
from tests.integration.known_blocks import SMALL, new_chain
from tests.integration.wire import Upload, Wire, refused, unharmed

SERVICE = "HintService"
NewDaemon = Callable[..., DaemonProcess]
METHOD = f"/kvservice_api.v1.{SERVICE}/Exchange"


class Exchange:
    """An open stream: `send` messages, and read the answers that have arrived so far by `ready`."""

    def __init__(self, wire: Wire, client_id: bytes | None = None) -> None:
        self._outgoing: SimpleQueue[pb.ExchangeRequest | None] = SimpleQueue()
        self.send(client_id=wire.client_id if client_id is None else client_id)
        self.call: Any = wire.hints.Exchange(iter(self._outgoing.get, None))
        self.limits = next(self.call).limits
        self.ready: dict[str, list[int]] = {}
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        with suppress(grpc.RpcError):
            for answer in self.call:
                for each in answer.readiness:
                    self.ready.setdefault(each.request_id, []).append(each.readiness)

    def send(self, **fields: Any) -> None:
        self._outgoing.put(pb.ExchangeRequest(**fields))

    def put(self, *requests: pb.QueuedRequest) -> None:
        self.send(changes=[pb.QueueChange(put=request) for request in requests])

    def hint(self, subject: pb.HintSubject, **kind: Any) -> None:
        self.send(hints=[pb.Hint(subject=subject, **kind)])

    def until_ready(self, request_id: str, readiness: int) -> None:
        until(lambda: self.ready.get(request_id, [0])[-1] == readiness)

    def end(self) -> grpc.StatusCode:
        self._outgoing.put(None)
        return self.over()

    def over(self) -> grpc.StatusCode:
        self._reader.join(SOON_S)
        code: grpc.StatusCode = self.call.code()
        return code


def by_session(session_id: str) -> pb.HintSubject:
    name = types_pb2.SessionName(session_id=session_id, layout_fingerprint=SMALL.fingerprint)
    return pb.HintSubject(session=name)


def by_keys(chain: BlockChain) -> pb.HintSubject:
    return pb.HintSubject(keys=chain.packed_keys)


def stored(wire: Wire, blocks: int = 2) -> BlockChain:
    """Blocks in both tiers."""
    chain = new_chain(SMALL, blocks)
    upload = Upload.of(wire, SMALL, chain, types_pb2.DURABILITY_SSD)
    assert wire.save(upload.messages()).stored == blocks
    return chain


def counted(wire: Wire, name: str) -> int:
    return int(wire.status().counters[name])


def test_Exchange_answers_with_limits_and_with_the_readiness_of_queued_requests(wire: Wire) -> None:
    chain = stored(wire)
    wire.append("hinted", SMALL, chain)
    exchange = Exchange(wire)
    assert (exchange.limits.max_queued_requests, exchange.limits.max_queued_keys) == (8192, 262_144)
    exchange.put(
        pb.QueuedRequest(request_id="keys", reads=by_keys(chain), starts_in_ms=0),
        pb.QueuedRequest(request_id="session", reads=by_session("hinted")),
        pb.QueuedRequest(request_id="absent", reads=by_keys(new_chain(SMALL))),
    )
    exchange.until_ready("keys", pb.READINESS_IN_DRAM)
    exchange.until_ready("session", pb.READINESS_IN_DRAM)
    exchange.until_ready("absent", pb.READINESS_ABSENT)
    assert wire.status().queued_requests == 3
    exchange.send(changes=[pb.QueueChange(remove="keys")])
    until(lambda: wire.status().queued_requests == 2)
    exchange.send(whole_queue=True)
    until(lambda: wire.status().queued_requests == 0)
    assert exchange.end() is grpc.StatusCode.OK
    until(lambda: wire.status().hint_streams == 0)


def test_Exchange_needs_an_attached_client(wire: Wire) -> None:
    with refused(UnknownClient, "attach"):
        Exchange(wire, client_id=b"")
    with refused(UnknownClient, "attach"):
        Exchange(wire, client_id=bytes(16))


def test_Exchange_ends_with_the_attachment_and_is_replaced_by_a_second_stream(daemon: DaemonProcess) -> None:
    with Wire(daemon.address) as watcher, Wire(daemon.address) as wire:
        wire.attach()
        first = Exchange(wire)
        first.put(pb.QueuedRequest(request_id="first", reads=by_keys(new_chain(SMALL))))
        first.until_ready("first", pb.READINESS_ABSENT)
        second = Exchange(wire)
        assert first.over() is grpc.StatusCode.OK
        assert (watcher.status().hint_streams, watcher.status().queued_requests) == (1, 0)
        second.put(pb.QueuedRequest(request_id="second", reads=by_keys(new_chain(SMALL))))
        second.until_ready("second", pb.READINESS_ABSENT)
        wire._leaving.set()  # Ends the Attach stream, and only that.
        assert second.over() is grpc.StatusCode.OK
        until(lambda: (watcher.status().hint_streams, watcher.status().queued_requests) == (0, 0))


def test_Exchange_refuses_bytes_that_are_no_message(wire: Wire) -> None:
    wire.called.append(METHOD)
    call = wire.channel.stream_stream(METHOD, None, None)
    with refused(InvalidRequest, "malformed"):
        list(call(iter([b"\xff\xff\xff"]), timeout=SOON_S))
    opening = pb.ExchangeRequest(client_id=wire.client_id).SerializeToString()
    with refused(InvalidRequest, "malformed"):
        list(call(iter([opening, b"\x0a"]), timeout=SOON_S))


@pytest.mark.parametrize(
    "message",
    [
        pb.ExchangeRequest(changes=[pb.QueueChange()]),
        pb.ExchangeRequest(changes=[pb.QueueChange(put=pb.QueuedRequest(request_id="no subject"))]),
        pb.ExchangeRequest(
            changes=[pb.QueueChange(put=pb.QueuedRequest(request_id="", reads=pb.HintSubject(keys=bytes(32))))]
        ),
        pb.ExchangeRequest(
            changes=[pb.QueueChange(put=pb.QueuedRequest(request_id="x" * 201, reads=pb.HintSubject(keys=bytes(32))))]
        ),
        pb.ExchangeRequest(
            changes=[pb.QueueChange(put=pb.QueuedRequest(request_id="cut", reads=pb.HintSubject(keys=bytes(33))))]
        ),
        pb.ExchangeRequest(hints=[pb.Hint(subject=pb.HintSubject(keys=bytes(32)))]),
        pb.ExchangeRequest(hints=[pb.Hint(typing=pb.Typing())]),
        pb.ExchangeRequest(hints=[pb.Hint(subject=by_session("käse"), typing=pb.Typing())]),
        pb.ExchangeRequest(hints=[pb.Hint(subject=by_session("a"), tool_call=pb.ToolCall(name="x" * 201))]),
    ],
    ids=lambda message: str(message)[:40].replace("\n", " "),
)
def test_Exchange_counts_a_hint_that_is_not_valid_and_continues(wire: Wire, message: pb.ExchangeRequest) -> None:
    before = counted(wire, "hints_invalid")
    exchange = Exchange(wire)
    exchange._outgoing.put(message)
    exchange.put(pb.QueuedRequest(request_id="next", reads=by_keys(new_chain(SMALL))))
    exchange.until_ready("next", pb.READINESS_ABSENT)
    assert counted(wire, "hints_invalid") == before + 1
    assert exchange.end() is grpc.StatusCode.OK


def test_Exchange_of_ten_thousand_requests_is_bounded_and_counted(wire: Wire, daemon: DaemonProcess) -> None:
    with unharmed(daemon.address) as chain:
        before = counted(wire, "hints_over_limit"), counted(wire, "hints_unknown")
        exchange = Exchange(wire)
        for start in range(0, 10_000, 500):
            exchange.put(
                *(
                    pb.QueuedRequest(request_id=f"request {number}", reads=by_session(f"no-such-session-{number}"))
                    for number in range(start, start + 500)
                )
            )
        until(lambda: counted(wire, "hints_over_limit") == before[0] + 10_000 - 8192)
        assert wire.status().queued_requests == 8192
        assert counted(wire, "hints_unknown") == before[1] + 10_000
        exchange.until_ready("request 8191", pb.READINESS_ABSENT)
        assert "request 8192" not in exchange.ready
        exchange.put(pb.QueuedRequest(request_id="request 0", reads=by_keys(chain), before="request 1"))
        exchange.until_ready("request 0", pb.READINESS_IN_DRAM)
        assert exchange.end() is grpc.StatusCode.OK


def test_Exchange_of_two_engines_that_contradict_each_other_harms_no_block(daemon: DaemonProcess) -> None:
    with unharmed(daemon.address) as chain, Wire(daemon.address) as one, Wire(daemon.address) as two:
        one.attach()
        two.attach()
        wants, denies = Exchange(one), Exchange(two)
        for number in range(50):
            wants.put(pb.QueuedRequest(request_id=f"request {number}", reads=by_keys(chain), priority=number))
            denies.hint(by_keys(chain), do_not_keep=pb.DoNotKeep())
            denies.hint(by_keys(chain), session_ended=pb.SessionEnded())
            wants.hint(by_keys(chain), typing=pb.Typing())
        wants.until_ready("request 49", pb.READINESS_IN_DRAM)
        assert one.lookup(SMALL, chain).hit_blocks == len(chain)
        wants.end()
        denies.end()


@contextmanager
def cut_after(address: str, byte_count: int) -> Iterator[str]:
    """An address that leads to the daemon, until so many bytes were sent to it. Then the connection is cut."""
    listening = socket.create_server(("127.0.0.1", 0))
    host, _, port = address.rpartition(":")

    def carry() -> None:
        near, _ = listening.accept()
        with suppress(OSError), near, socket.create_connection((host, int(port))) as far:
            back = threading.Thread(target=pump, args=(far, near, 1 << 40), daemon=True)
            back.start()
            pump(near, far, byte_count)
            for each in (near, far):
                each.shutdown(socket.SHUT_RDWR)
            back.join(SOON_S)

    def pump(source: socket.socket, target: socket.socket, left: int) -> None:
        with suppress(OSError):
            while left > 0 and (data := source.recv(min(left, 4096))):
                target.sendall(data)
                left -= len(data)

    thread = threading.Thread(target=carry, daemon=True)
    thread.start()
    yield f"127.0.0.1:{listening.getsockname()[1]}"
    listening.close()
    thread.join(SOON_S)


def test_Exchange_that_is_cut_in_the_middle_of_a_message_leaves_nothing(daemon: DaemonProcess) -> None:
    with Wire(daemon.address) as watcher, unharmed(daemon.address), cut_after(daemon.address, 60_000) as address:
        wire = Wire(address)
        wire.attach()
        exchange = Exchange(wire)
        exchange.put(pb.QueuedRequest(request_id="before", reads=by_keys(new_chain(SMALL))))
        exchange.until_ready("before", pb.READINESS_ABSENT)
        exchange.put(pb.QueuedRequest(request_id="cut", reads=pb.HintSubject(keys=bytes(32 * 8192))))
        assert exchange.over() is grpc.StatusCode.UNAVAILABLE
        until(lambda: (watcher.status().hint_streams, watcher.status().queued_requests) == (0, 0))
        wire.__exit__()


IDS = st.sampled_from(["", "a", "b", "c", "x" * 300, "known"])
SUBJECTS = st.one_of(
    st.builds(pb.HintSubject, keys=st.binary(max_size=100)),
    st.builds(by_session, st.sampled_from(["hinted", "unknown", "", "not valid"])),
    st.builds(pb.HintSubject),
)
REQUESTS = st.builds(
    pb.QueuedRequest,
    request_id=IDS,
    reads=SUBJECTS,
    starts_in_ms=st.one_of(st.none(), st.integers(0, 2**32 - 1)),
    priority=st.integers(-(2**31), 2**31 - 1),
    before=IDS,
)
CALLS = st.builds(pb.ToolCall, name=IDS, expected_ms=st.integers(0, 2**32 - 1))
HINTS = st.one_of(
    st.builds(pb.Hint, subject=SUBJECTS, typing=st.just(pb.Typing())),
    st.builds(pb.Hint, subject=SUBJECTS, tool_call=CALLS),
    st.builds(pb.Hint, subject=SUBJECTS, session_ended=st.just(pb.SessionEnded())),
    st.builds(pb.Hint, subject=SUBJECTS, do_not_keep=st.just(pb.DoNotKeep())),
    st.builds(pb.Hint, subject=SUBJECTS, turn_finished=st.builds(pb.TurnFinished, stop_reason=IDS)),
)
MESSAGES = st.builds(
    pb.ExchangeRequest,
    whole_queue=st.booleans(),
    changes=st.lists(st.one_of(st.builds(pb.QueueChange, put=REQUESTS), st.builds(pb.QueueChange, remove=IDS))),
    hints=st.lists(HINTS),
).map(lambda message: message.SerializeToString())


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(messages=st.lists(st.one_of(MESSAGES, st.binary(max_size=60)), max_size=6))
def test_Exchange_survives_any_messages(daemon: DaemonProcess, messages: list[bytes]) -> None:
    with Wire(daemon.address) as wire:
        wire.attach()
        opening = pb.ExchangeRequest(client_id=wire.client_id).SerializeToString()
        call: Any = wire.channel.stream_stream(METHOD, None, None)(iter([opening, *messages]), timeout=SOON_S)
        with suppress(grpc.RpcError):
            list(call)
        assert call.code() in (grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT)
        assert wire.status().state == "serving"


def test_Exchange_of_any_messages_harmed_nothing_and_logged_no_error(wire: Wire, daemon: DaemonProcess) -> None:
    """After all tests above."""
    wire.called.append(METHOD)
    until(lambda: wire.status().hint_streams == 0)
    assert wire.status().queued_requests == 0
    assert not [line for line in daemon.log if line["level"] == "error"]
