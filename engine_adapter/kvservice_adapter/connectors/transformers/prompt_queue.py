"""Prompts that wait for their batch, in the order of their histories' readiness.

    queue = connector.queue()
    queue.add("request-1", input_ids, session_id="chat-17")
    for prompt in queue.take(8):                       # the next batch
        ...

The queue sends itself to the daemon as hints, so histories are promoted from SSD while the prompts wait.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, NamedTuple

from numpy.typing import NDArray

from kvservice_adapter.connectors.transformers.rows import TokenIds
from kvservice_api.errors import InvalidRequest
from kvservice_client import BlockChain, Client, QueuedRequest, ReadyState, Session

_READY = (ReadyState.IN_DRAM, ReadyState.ABSENT)


class QueuedPrompt(NamedTuple):
    """`token_ids` ``[token]``, u32 or larger."""

    request_id: str
    token_ids: NDArray[Any]
    session_id: str


class PromptQueue:
    """First come, first served, among those whose histories need no read from SSD. Get it from the connector.

    May be called from any thread. Makes no call to the daemon, and does not wait for it. While the daemon is away, the
    order is that of arrival.
    """

    def __init__(
        self,
        client: Client,
        reads_of: Callable[[TokenIds, str], tuple[NDArray[Any], Session | BlockChain]],
        patience_s: float,
    ) -> None:
        """`reads_of` checks token ids and a session id, and returns the tokens and what a restore of them reads. A
        prompt that waited for `patience_s` goes before all that waited less, ready or not.
        """
        self._hints = client.hints()
        self._clock = client.clock
        self._reads_of = reads_of
        self._patience_s = patience_s
        self._lock = threading.Lock()
        self._prompts: dict[str, tuple[QueuedPrompt, float, bool]] = {}  # With the time, and whether a hint was sent.

    def __len__(self) -> int:
        return len(self._prompts)

    def add(self, request_id: str, token_ids: TokenIds, *, session_id: str = "", priority: int = 0) -> None:
        """Put one prompt at the end. Raises InvalidRequest for an id that is in the queue, and as `restore`."""
        tokens, reads = self._reads_of(token_ids, session_id)
        is_hinted = isinstance(reads, Session) or len(reads) > 0
        with self._lock:
            if request_id in self._prompts:
                raise InvalidRequest(f"the request {request_id!r} is in the queue already", field="request_id")
            if is_hinted:  # A prompt of less than a block has nothing to load.
                self._hints.put(QueuedRequest(request_id, reads, priority=priority))
            prompt = QueuedPrompt(request_id, tokens, session_id)
            self._prompts[request_id] = prompt, self._clock.now_s(), is_hinted

    def remove(self, request_id: str) -> bool:
        """Take a prompt out that is given up. Whether it was in the queue."""
        with self._lock:
            return self._take(request_id) is not None

    def take(self, count: int) -> list[QueuedPrompt]:
        """The next batch: at most `count` prompts, at least one if there is one.

        Those that waited too long, and those that are ready. If there are none, the first ones: their loads overlap
        with the computation.
        """
        with self._lock:
            late_s = self._clock.now_s() - self._patience_s
            late, ready = [], []
            for name, (_, since_s, is_hinted) in self._prompts.items():
                if since_s <= late_s:
                    late.append(name)
                elif not is_hinted or self._hints.readiness(name).state in _READY:
                    ready.append(name)
            names = [*late, *ready] or list(self._prompts)
            return [prompt for name in names[:count] if (prompt := self._take(name)) is not None]

    def _take(self, request_id: str) -> QueuedPrompt | None:
        prompt, _, _ = self._prompts.pop(request_id, (None, 0.0, False))
        if prompt is not None:
            self._hints.remove(request_id)
        return prompt
