"""Which pages of a request there are to load into, and to save from.

Where a layer has a sliding window, vLLM frees pages that are before it, and then the request has the null page in
their place. A save is ordered a step after its KV was computed, when vLLM may have freed pages of it, which are not
written yet. So the ids of the pages that a request had in the last step are kept for one step.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

from kvservice_adapter.connectors.vllm.metadata import PageIds
from kvservice_adapter.connectors.vllm.model_layout import PageGroup

NULL_PAGE = 0  # vLLM's: its bytes are nothing's KV.

PagesOfRequest = tuple[list[int], ...]  # Page ids per group, as vLLM has them.


class RequestPages:
    """The pages of all requests of a scheduler. All methods are called on its thread."""

    def __init__(self, groups: Sequence[PageGroup]) -> None:
        self._groups = groups
        self.are_freed = any(group.window for group in groups)  # While a request runs.
        self._manager: Any = None
        self._kept: dict[str, PagesOfRequest] = {}  # By request, as they were at the end of the last step's orders.
        self._former: dict[str, PagesOfRequest] = {}

    def bind(self, manager: Any) -> None:
        """vLLM's KV cache manager."""
        self._manager = manager

    def of(self, request_id: str) -> PagesOfRequest:
        """Those that a request has now."""
        given: PagesOfRequest = self._manager.get_block_ids(request_id)
        return given

    def to_load(self, given: PagesOfRequest, first_token: int, end_token: int) -> tuple[PageIds, tuple[int, ...]]:
        """The pages of the first `end_token` tokens, and from which token on to load, per group."""
        pages = self._until(given, end_token)
        begins = []
        for group, ids in zip(self._groups, pages, strict=True):
            missing = next((place for place, page in enumerate(ids) if page != NULL_PAGE), len(ids))
            begins.append(min(max(first_token, missing * group.page_tokens), end_token))
        return pages, tuple(begins)

    # A step, in order

    def begin_step(self) -> list[str]:
        """Before a step's saves are ordered. Returns the requests of which `keep` was called in the last step."""
        self._former, self._kept = self._kept, {}
        return list(self._former)

    def to_save(
        self, request_id: str, first_token: int, end_token: int, given: PagesOfRequest | None = None
    ) -> tuple[PageIds, bool] | None:
        """The pages of tokens ``[first_token, end_token)``, and whether some of them are freed in this step.

        None if there is no page of some of the tokens any more. Between steps, where a request ends, vLLM has freed
        pages since the last step, and `given` are those that are left.
        """
        pages = self._until(given or self.of(request_id), end_token)
        kept = self._former if given is None else self._kept
        former = kept.get(request_id)
        found, is_freed = [], False
        for number, (group, ids) in enumerate(zip(self._groups, pages, strict=True)):
            first = first_token // group.page_tokens
            if NULL_PAGE in ids[first:]:
                known = former[number][: len(ids)] if former is not None else ()
                ids = tuple(now or then for now, then in zip_longest(ids, known, fillvalue=NULL_PAGE))
                is_freed = True
                if NULL_PAGE in ids[first:]:
                    return None
            found.append(ids)
        return tuple(found), is_freed

    def keep(self, request: Any) -> None:
        """Of a request that may have something to save in the next step, after this step's saves are ordered."""
        if self.are_freed:
            self._kept[request.request_id] = self.of(request.request_id)

    def forget(self, request_id: str) -> None:
        """The request has ended, and its save is ordered. Another one may have its name."""
        self._kept.pop(request_id, None)

    def _until(self, given: PagesOfRequest, end_token: int) -> PageIds:
        return tuple(
            tuple(ids[: -(-end_token // group.page_tokens)]) for group, ids in zip(self._groups, given, strict=True)
        )
