"""Which blocks of a request are to be saved in a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from kvservice_adapter.connectors.vllm.metadata import PageSaveOrder
from kvservice_adapter.connectors.vllm.request_pages import PagesOfRequest, RequestPages
from kvservice_api.keys import ChainBuilder


class SavedRequest(Protocol):
    """What saving needs to know of a request, and changes."""

    request: Any
    builder: ChainBuilder
    may_save: bool
    began: tuple[int, int] | None
    saved_tokens: int


class RequestSaves:
    """The save orders of a scheduler. All methods are called on its thread, and return one order or none."""

    def __init__(self, pages: RequestPages, block_tokens: int, extend: Callable[[Any], None]) -> None:
        """`extend` hashes the tokens of a request that are not hashed yet."""
        self._pages, self._block_tokens, self._extend = pages, block_tokens, extend

    def of_step(self, state: SavedRequest) -> list[PageSaveOrder]:
        """Whole blocks, before a step that may complete another one."""
        if not state.may_save:
            return []
        request, size = state.request, self._block_tokens
        computed = request.num_computed_tokens - request.num_in_flight_tokens
        orders = self._orders(state, computed // size * size, computed)
        if state.may_save:
            self._pages.keep(request)
        return orders

    def at_end(self, state: SavedRequest, last_pages: PagesOfRequest) -> list[PageSaveOrder]:
        """What is left of a request that has ended, also a partial block."""
        computed = state.request.num_computed_tokens - state.request.num_in_flight_tokens
        return self._orders(state, computed, computed, last_pages)

    def _orders(
        self, state: SavedRequest, end_token: int, computed_tokens: int, last_pages: PagesOfRequest | None = None
    ) -> list[PageSaveOrder]:
        """The save of tokens that the scheduler knows, and whose KV earlier steps have computed."""
        # vLLM shares pages between requests of one step before their KV is computed or loaded. So nothing of a request
        # is saved before a step of its own has ended: then its earlier tokens are there too. Kept pages are of the same
        # attempt, for the same reason.
        request, size = state.request, self._block_tokens
        if state.began is None or state.began[0] != request.num_preemptions or computed_tokens <= state.began[1]:
            return []
        known = request.num_tokens
        if end_token > known:
            end_token = known if last_pages is not None else known // size * size
        if end_token <= state.saved_tokens:
            return []
        first = state.saved_tokens // size
        pages, begin, is_freed = self._pages.to_save(request.request_id, first * size, end_token, last_pages)
        if begin > first * size:
            first = -(-begin // size)
            if first * size > state.began[1]:  # A window is shorter than a block.
                state.may_save = False
                return []
            # vLLM's own prefix cache has only the window of what is before it. The request that computed it saves it.
            if first * size >= end_token:
                return []
        self._extend(state)
        chain = state.builder.prefix(end_token)[first:]
        state.saved_tokens = end_token
        is_freed |= last_pages is not None
        headers = dict(request.trace_headers) if request.trace_headers else None
        return [PageSaveOrder(request.request_id, chain, first * size, pages, is_freed, headers)]
