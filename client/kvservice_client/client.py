"""The client: one daemon, from one process."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from itertools import islice
from types import TracebackType
from typing import Literal, NamedTuple, Self

from kvservice_api.errors import DaemonTooOld, InvalidRequest
from kvservice_api.layout import Layout, Shard
from kvservice_api.session_ids import checked_session_id
from kvservice_api.v1 import blocks_pb2 as pb
from kvservice_api.v1 import types_pb2
from kvservice_client import arguments
from kvservice_client.admin import Admin, Tier
from kvservice_client.arena_map import ArenaObserver
from kvservice_client.block_cache import BlockCache
from kvservice_client.channel import BLOCKS
from kvservice_client.connection import Connection
from kvservice_client.hints import EngineHints
from kvservice_client.reports import RequestReport
from kvservice_client.retry import SYSTEM_CLOCK, Clock, Deadline
from kvservice_client.session import Session
from kvservice_client.tls import TlsFiles
from kvservice_client.transports.ordered import OrderedTransports, Stats

DEFAULT_ADDRESS = "127.0.0.1:7070"

_SESSIONS_MAX = 64  # Of one request.


class PrefetchResult(NamedTuple):
    """Counts of blocks; a session that does not exist counts as one missing block. `failed` is known only if the client
    waited.
    """

    missing: int
    in_dram: int
    promoted: int
    failed: int


class EvictResult(NamedTuple):
    """Counts of copies (`evicted`, `held`) and of keys (`missing`); a session that does not exist counts as one key."""

    evicted: int
    held: int
    missing: int


class Client:
    """Synchronous and thread-safe. Connects at the first call, and reconnects automatically. A context manager.

    Every call ends within its timeout, by default `timeout_s`, and raises only KVErrors. While the
    daemon is away, calls wait at most `reconnect_wait_s` for it before they raise DaemonUnavailable.
    """

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        name: str = "",
        timeout_s: float = 5.0,
        reconnect_wait_s: float = 0.5,
        tls: TlsFiles | None = None,
        transport: Literal["auto", "shm", "bulk", "grpc"] = "auto",
        throttle_bytes_per_s: float = 0.0,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        """`address` is host:port or the path of a UNIX socket; operators see `name`.

        With `tls`, connections to host:port use TLS. `transport` is how bytes are moved: through shared memory if
        possible, else through the daemon's bulk port if there are a few MiB, else by gRPC ("auto"); always by gRPC
        ("grpc"); through shared memory, with an error if the daemon's arena is not on this host ("shm"); or through the
        bulk port, also a few bytes, with an error if there is none or it cannot be reached ("bulk"). gRPC carries what
        these cannot. `throttle_bytes_per_s` limits the transfer rate of blocks, for measurements and tests. Deadlines,
        pauses and the remaining time of leases use `clock`. Raises InvalidRequest, TlsFileUnusable.
        """
        arguments.client_name(name)
        self._name = name
        arguments.seconds(timeout_s, "timeout_s")
        arguments.seconds(reconnect_wait_s, "reconnect_wait_s")
        if tls is not None:
            arguments.instance(tls, TlsFiles, "tls")
        if transport not in ("auto", "shm", "bulk", "grpc"):
            raise InvalidRequest(
                f"transport is {transport!r}; it must be 'auto', 'shm', 'bulk' or 'grpc'", field="transport"
            )
        arguments.rate(throttle_bytes_per_s, "throttle_bytes_per_s")
        self._connection = Connection(address, name, timeout_s, reconnect_wait_s, tls, clock)
        self._transports = OrderedTransports(self._connection, transport, throttle_bytes_per_s)
        self._hints = EngineHints(self._connection.channel, self._connection.attach_stream, clock)
        weakref.finalize(self._connection, self._hints.close)
        self.admin = Admin(self._connection)

    def __repr__(self) -> str:
        return f"Client({self.address!r}, name={self._name!r})"

    @property
    def address(self) -> str:
        return self._connection.channel.address

    @property
    def clock(self) -> Clock:
        """What this client's deadlines, pauses and leases go by."""
        return self._connection.clock

    def close(self) -> None:
        """End all leases and the connection. Objects that this client returned cannot be used after this."""
        self._hints.close()
        self._connection.close()
        self._transports.close()

    def stats(self) -> Stats:
        """Which transports moved how many bytes so far."""
        return self._transports.stats()

    def check_bulk(self, timeout_s: float | None = None) -> None:
        """Whether this client can reach the daemon's bulk port: connects to it, with TLS if the client uses TLS.

        Waits a second at most for the connection. Raises BulkUnavailable, with the reason.
        """
        self._transports.check_bulk(self._connection.deadline(timeout_s))

    def observe_arenas(self, observer: ArenaObserver) -> None:
        """Have it follow where the daemon's shared memory is in this process, from now on: to register it for DMA.

        Nothing is called where that memory is on another host, or cannot be written by this process. Waits for nothing.
        In a forked child it is over.
        """
        self._transports.observe_arenas(observer)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def capabilities(self, timeout_s: float | None = None) -> pb.GetCapabilitiesResponse:
        """The daemon's version, boot epoch, limits and transports, read with a call each time."""
        deadline = self._connection.deadline(timeout_s)
        request = pb.GetCapabilitiesRequest()
        return self._connection.ask(BLOCKS + "GetCapabilities", request, pb.GetCapabilitiesResponse, deadline)

    def open_layout(self, layout: Layout, shard: Shard | None = None) -> BlockCache:
        """The blocks of one layout, for one rank's shard; without a shard, the whole blocks.

        Makes no call yet. The first call opens the layout in the daemon; a call after the daemon's restart opens it
        again. Raises InvalidRequest.
        """
        arguments.instance(layout, Layout, "layout")
        shard = Shard.whole(layout) if shard is None else arguments.instance(shard, Shard, "shard").check(layout)
        return BlockCache(self._connection, self._transports, layout, shard)

    def session(self, layout: Layout, session_id: str, shard: Shard | None = None) -> Session:
        """A conversation whose history the daemon stores under this id. Makes no call yet.

        `session_id` has 1 to 200 ASCII letters, digits and ``-_.:@/+=~``, or InvalidRequest is raised. Sessions of
        one id in several layouts are several sessions. The ranks of one model share a session: one of them changes it.
        """
        return Session(self._connection, self.open_layout(layout, shard), checked_session_id(session_id))

    def hints(self) -> EngineHints:
        """The hints of this client: its engine's queue, and what it knows of the next requests. One object per client.

        Does not wait. The first hint opens a stream to the daemon, on a thread of its own.
        """
        return self._hints

    def report_request(self, report: RequestReport) -> None:
        """Report to the daemon, in the background, how a request went: `kvctl explain` shows it.

        Does not wait, and does not raise for a failure of the daemon. While the daemon is away, the last 256 reports
        are kept. Raises InvalidRequest for a plan that does not exist.
        """
        self._connection.reporter.report(arguments.instance(report, RequestReport, "report"))

    def prefetch(
        self,
        keys: Iterable[bytes] = (),
        *,
        sessions: Iterable[Session] = (),
        wait: bool = False,
        deadline_s: float = 0.0,
        timeout_s: float | None = None,
    ) -> PrefetchResult:
        """Request the promotion of blocks and of whole sessions to DRAM, those with the earliest `deadline_s` first.

        Does not count as a use of the sessions. Raises DaemonTooOld for sessions, if the daemon takes only keys.
        """
        deadline = self._connection.deadline(timeout_s)
        deadline_ms = round(arguments.seconds(deadline_s, "deadline_s") * 1e3)
        total = PrefetchResult(0, 0, 0, 0)
        for named in self._named(keys, sessions, deadline):
            request = arguments.message(pb.PrefetchRequest, **named, deadline_ms=deadline_ms, wait=wait)
            answer = self._connection.ask(BLOCKS + "Prefetch", request, pb.PrefetchResponse, deadline)
            total = PrefetchResult(
                total.missing + answer.missing + answer.missing_sessions,
                total.in_dram + answer.in_dram,
                total.promoted + answer.promoted,
                total.failed + answer.failed,
            )
        return total

    def evict(
        self,
        keys: Iterable[bytes] = (),
        tier: Tier | str | None = None,
        timeout_s: float | None = None,
        *,
        sessions: Iterable[Session] = (),
    ) -> EvictResult:
        """Drop blocks, and all blocks of sessions, from one tier. Those that are leased or busy stay.

        Blocks that other sessions name too are dropped. Raises DaemonTooOld for sessions, if the daemon takes only
        keys.
        """
        deadline, fields = self._connection.deadline(timeout_s), arguments.tier_fields(tier)
        total = EvictResult(0, 0, 0)
        for named in self._named(keys, sessions, deadline):
            request = arguments.message(pb.EvictRequest, **named, **fields)
            answer = self._connection.ask(BLOCKS + "Evict", request, pb.EvictResponse, deadline)
            total = EvictResult(
                total.evicted + answer.evicted,
                total.held + answer.held,
                total.missing + answer.missing + answer.missing_sessions,
            )
        return total

    def _named(
        self, keys: Iterable[bytes], sessions: Iterable[Session], deadline: Deadline
    ) -> Iterator[dict[str, object]]:
        """The fields of requests that name the keys and the sessions, in requests that the daemon accepts."""
        for packed in self._packed(keys, deadline):
            yield {"keys": packed}
        remaining = iter(sessions)
        while some := [arguments.instance(each, Session, "sessions") for each in islice(remaining, _SESSIONS_MAX)]:
            limits = self._connection.retried(lambda: self._connection.limits(deadline), deadline)
            if not limits.takes_hints:
                raise DaemonTooOld("this daemon takes keys here, and no sessions")
            yield {
                "sessions": [
                    types_pb2.SessionName(session_id=each.session_id, layout_fingerprint=each.layout.fingerprint)
                    for each in some
                ]
            }

    def _packed(self, keys: Iterable[bytes], deadline: Deadline) -> Iterator[bytes]:
        """The keys, in requests that the daemon accepts."""
        limits = self._connection.retried(lambda: self._connection.limits(deadline), deadline)
        yield from arguments.packed_keys(keys, limits.max_keys)
