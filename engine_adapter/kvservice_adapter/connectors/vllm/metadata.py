"""What the two roles tell each other at each step: plain data, pickled by vLLM."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata, KVConnectorWorkerMetadata

from kvservice_adapter.connectors.vllm.request_progress import EndedLoad
from kvservice_adapter.connectors.vllm.settings import LoadMode
from kvservice_api.keys import BlockChain

PageIds = tuple[tuple[int, ...], ...]  # Of a request, from its first token on: per KV cache group of vLLM's.


@dataclass(frozen=True, slots=True)
class PageLoadOrder:
    """Copy tokens ``[first_token, end_token)`` of a leased prefix into a request's pages."""

    request_id: str
    attempt: int  # The request's preemptions so far. With `request_id` it names the load.
    ticket: bytes  # Of the lease: each worker adopts it.
    first_token: int
    end_token: int
    page_ids: PageIds
    begins: tuple[int, ...]  # Per group: tokens before it are not copied, because a sliding window has no pages there.
    mode: LoadMode
    trace_headers: Mapping[str, str] | None = None  # Of the request, as vLLM has them: W3C Trace Context.


@dataclass(frozen=True, slots=True)
class PageSaveOrder:
    """Store blocks whose KV earlier steps have computed.

    If `is_freed`, vLLM may give the pages to another request in this step: they are read before anything is written.
    """

    request_id: str
    chain: BlockChain  # The blocks to save; its parent is the key before them.
    first_token: int
    page_ids: PageIds  # As far as the chain goes. Those before it may be missing (0).
    is_freed: bool
    trace_headers: Mapping[str, str] | None = None  # As those of loads.


@dataclass(slots=True)
class StepOrders(KVConnectorMetadata):
    """Scheduler to workers."""

    loads: list[PageLoadOrder] = field(default_factory=list)
    saves: list[PageSaveOrder] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)  # Requests whose asynchronous load is not wanted any more.


@dataclass(frozen=True, slots=True)
class FailedLoad:
    """A load that ended without its KV."""

    request_id: str
    attempt: int
    valid_tokens: int  # How many tokens of the request have right KV in its pages.
    reason: str
    is_unanswered: bool  # Whether the daemon did not answer in time.


@dataclass(slots=True)
class StepReport(KVConnectorWorkerMetadata):
    """Workers to scheduler."""

    failed: list[FailedLoad] = field(default_factory=list)
    loaded: list[EndedLoad] = field(default_factory=list)
    dropped_saves: list[tuple[str, int]] = field(default_factory=list)  # (request, first token), to be ordered again.
    is_daemon_away: bool = False  # A worker's circuit breaker is open.

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVConnectorWorkerMetadata:
        """The reports of two workers of one step."""
        assert isinstance(other, StepReport)
        return StepReport(
            self.failed + other.failed,
            self.loaded + other.loaded,
            self.dropped_saves + other.dropped_saves,
            self.is_daemon_away or other.is_daemon_away,
        )
