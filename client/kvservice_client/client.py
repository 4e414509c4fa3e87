"""The client: one daemon, from one process."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Literal, NamedTuple, Self

from kvservice_api.errors import InvalidRequest
from kvservice_api.layout import Layout, Shard
from kvservice_api.session_ids import checked_session_id
from kvservice_api.v1 import blocks_pb2 as pb
from kvservice_client import arguments
from kvservice_client.admin import Admin, Tier
from kvservice_client.block_cache import BlockCache
from kvservice_client.channel import BLOCKS
from kvservice_client.connection import Connection
from kvservice_client.reports import RequestReport
from kvservice_client.retry import SYSTEM_CLOCK, Clock, Deadline
from kvservice_client.session import Session
from kvservice_client.tls import TlsFiles
from kvservice_client.transports.ordered import OrderedTransports, Stats

DEFAULT_ADDRESS = "127.0.0.1:7070"


class PrefetchResult(NamedTuple):
    """Counts of blocks. `failed` is known only where the client waited."""

    missing: int
    in_dram: int
    promoted: int
    failed: int


class EvictResult(NamedTuple):
    """Counts of copies (`evicted`, `held`) and of keys (`missing`)."""

    evicted: int
    held: int
    missing: int


class Client:
    """Synchronous and thread-safe. Connects with the first call, and again by itself. A context manager.

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
        transport: Literal["auto", "shm", "grpc"] = "auto",
        throttle_bytes_per_s: float = 0.0,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        """`address` is host:port or the path of a UNIX socket; `name` is what operators see of this client.

        With `tls`, host:port is spoken to by TLS. `transport` is how bytes travel: by shared memory wherever that
        works, and else by gRPC ("auto"); never by shared memory ("grpc"); or as in "auto", but a daemon whose arena
        is not here is an error ("shm"). With `throttle_bytes_per_s` blocks travel no faster than that, which is for
        measurements and tests. Deadlines, pauses and the time that leases have left go by `clock`. Raises
        InvalidRequest, TlsFileUnusable.
        """
        arguments.client_name(name)
        arguments.seconds(timeout_s, "timeout_s")
        arguments.seconds(reconnect_wait_s, "reconnect_wait_s")
        if tls is not None:
            arguments.instance(tls, TlsFiles, "tls")
        if transport not in ("auto", "shm", "grpc"):
            raise InvalidRequest(f"transport is {transport!r}; it must be 'auto', 'shm' or 'grpc'", field="transport")
        arguments.rate(throttle_bytes_per_s, "throttle_bytes_per_s")
        self._connection = Connection(address, name, timeout_s, reconnect_wait_s, tls, clock)
        self._transports = OrderedTransports(self._connection, transport, throttle_bytes_per_s)
        self.admin = Admin(self._connection)

    @property
    def address(self) -> str:
        return self._connection.channel.address

    @property
    def clock(self) -> Clock:
        """What this client's deadlines, pauses and leases go by."""
        return self._connection.clock

    def close(self) -> None:
        """End all leases and the connection. What this client handed out is of no use after this."""
        self._connection.close()
        self._transports.close()

    def stats(self) -> Stats:
        """Which transports moved how many bytes so far."""
        return self._transports.stats()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def capabilities(self, timeout_s: float | None = None) -> pb.GetCapabilitiesResponse:
        """The daemon's version, boot epoch, limits and transports, asked for anew."""
        deadline = self._connection.deadline(timeout_s)
        request = pb.GetCapabilitiesRequest()
        return self._connection.ask(BLOCKS + "GetCapabilities", request, pb.GetCapabilitiesResponse, deadline)

    def open_layout(self, layout: Layout, shard: Shard | None = None) -> BlockCache:
        """The blocks of one layout, as one rank sees them; the whole of each block where no shard is given.

        Asks the daemon nothing yet. The layout is made known to it with the first call, and again
        after it restarted. Raises InvalidRequest.
        """
        arguments.instance(layout, Layout, "layout")
        shard = Shard.whole(layout) if shard is None else arguments.instance(shard, Shard, "shard").check(layout)
        return BlockCache(self._connection, self._transports, layout, shard)

    def session(self, layout: Layout, session_id: str, shard: Shard | None = None) -> Session:
        """A conversation whose history the daemon knows by this id. Asks the daemon nothing yet.

        `session_id` has 1 to 200 ASCII letters, digits and ``-_.:@/+=~``, or InvalidRequest is raised. Sessions of
        one id in several layouts are several sessions. The ranks of one model share a session: one of them changes it.
        """
        return Session(self._connection, self.open_layout(layout, shard), checked_session_id(session_id))

    def report_request(self, report: RequestReport) -> None:
        """Tell the daemon, in the background, what became of a request: `kvctl explain` shows it.

        Waits for nobody and raises for nothing that the daemon does. While it is away, the last 256 reports are
        kept. Raises InvalidRequest for a plan that does not exist.
        """
        self._connection.reporter.report(arguments.instance(report, RequestReport, "report"))

    def prefetch(
        self, keys: Iterable[bytes], *, wait: bool = False, deadline_s: float = 0.0, timeout_s: float | None = None
    ) -> PrefetchResult:
        """Ask for blocks to be copied up to DRAM, those with the nearest `deadline_s` first."""
        deadline = self._connection.deadline(timeout_s)
        deadline_ms = round(arguments.seconds(deadline_s, "deadline_s") * 1e3)
        total = PrefetchResult(0, 0, 0, 0)
        for packed in self._packed(keys, deadline):
            request = arguments.message(pb.PrefetchRequest, keys=packed, deadline_ms=deadline_ms, wait=wait)
            answer = self._connection.ask(BLOCKS + "Prefetch", request, pb.PrefetchResponse, deadline)
            total = PrefetchResult(
                total.missing + answer.missing,
                total.in_dram + answer.in_dram,
                total.promoted + answer.promoted,
                total.failed + answer.failed,
            )
        return total

    def evict(self, keys: Iterable[bytes], tier: Tier | str, timeout_s: float | None = None) -> EvictResult:
        """Drop blocks from one tier. Those that are leased or busy stay."""
        deadline, fields = self._connection.deadline(timeout_s), arguments.tier_fields(tier)
        total = EvictResult(0, 0, 0)
        for packed in self._packed(keys, deadline):
            request = pb.EvictRequest(keys=packed, **fields)
            answer = self._connection.ask(BLOCKS + "Evict", request, pb.EvictResponse, deadline)
            total = EvictResult(
                total.evicted + answer.evicted, total.held + answer.held, total.missing + answer.missing
            )
        return total

    def _packed(self, keys: Iterable[bytes], deadline: Deadline) -> Iterator[bytes]:
        """The keys, in requests that the daemon accepts."""
        limits = self._connection.retried(lambda: self._connection.limits(deadline), deadline)
        yield from arguments.packed_keys(keys, limits.max_keys)
