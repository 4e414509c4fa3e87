"""A conversation on the engine's side: all of its tokens, and where it was cut.

    conversation = Conversation("chat-17")
    history = connector.restore(input_ids, conversation=conversation)
    ...
    connector.save(output_ids, history.cache, conversation=conversation)
    connector.truncate(conversation, keep)           # the context overflows: some tokens leave
    input_ids = [*conversation.token_ids, *new]      # what is left, and the next message

The remaining tokens do not show which tokens were dropped, but their KV was computed with attention to those. So the
log keeps all tokens, at four bytes per token: the key of the session's tip follows from them. A session with another
tip is not this conversation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvservice_adapter.truncation import kept_tokens
from kvservice_api.keys import BlockChain, ChainBuilder, cut_key, kept_ranges, root_key
from kvservice_api.layout import Layout
from kvservice_api.session_ids import checked_session_id
from kvservice_client import SessionState

_HIDDEN_TAG = b"kvservice/hidden/1"

Tokens = NDArray[np.uint32]
Ranges = tuple[tuple[int, int], ...]


class Keys(NamedTuple):
    """The inputs of a chain's keys other than its tokens."""

    layout: Layout
    salt: bytes = b""
    extra: bytes = b""

    @property
    def root(self) -> bytes:
        return root_key(self.layout.fingerprint, self.salt)

    def chain(
        self,
        token_ids: Any,
        parent: bytes | None = None,
        *,
        with_partial: bool = False,
        hidden: NDArray[np.bool_] | None = None,
    ) -> BlockChain:
        """The blocks of tokens, from the root or from `parent` on. Arguments as for `builder`."""
        builder = self.builder(token_ids, parent, hidden=hidden)
        return builder.prefix(builder.token_count) if with_partial else builder.chain

    def builder(
        self, token_ids: Any, parent: bytes | None = None, *, hidden: NDArray[np.bool_] | None = None
    ) -> ChainBuilder:
        """The chain of tokens, from the root or from `parent` on; also of their first tokens.

        `hidden` ``[token]`` marks tokens that the attention mask hides from all others. They change the KV of what
        follows them, so blocks with such tokens, and all blocks after them, have other keys. Of a block with
        hidden tokens a shorter part may have another key than that of a chain that ends there. Raises InvalidRequest
        for an invalid token id.
        """
        size = self.layout.block_tokens
        marks = None if hidden is None else hidden[: len(token_ids)]

        def extra_of_block(block: int) -> bytes:
            of_block = marks[block * size : (block + 1) * size] if marks is not None else None
            if of_block is None or not of_block.any():
                return self.extra
            return self.extra + _HIDDEN_TAG + np.packbits(of_block).tobytes()

        builder = ChainBuilder(self.layout, salt=self.salt, parent=parent, extra_of_block=extra_of_block)
        builder.extend(token_ids)
        return builder


@dataclass(frozen=True, slots=True)
class Cut:
    """The tokens between the cut before and this one, and what this one kept of the history: (first, count) each."""

    tokens: Tokens
    kept_ranges: Ranges


class Conversation:
    """Grows by `extend`, and loses its middle by `truncate`. For one thread at a time; can be pickled."""

    def __init__(self, session_id: str) -> None:
        """Raises InvalidRequest for a `session_id` that breaks the rule: `checked_session_id`."""
        self.session_id = checked_session_id(session_id)
        self._cuts: list[Cut] = []
        self._kept = _NOTHING  # Tokens that the last cut kept.
        self._since_cut = _NOTHING

    @property
    def token_ids(self) -> Tokens:
        """The history as it is now, uint32 ``[token]``."""
        return np.concatenate([self._kept, self._since_cut])

    @property
    def token_count(self) -> int:
        return len(self._kept) + len(self._since_cut)

    @property
    def kept_tokens(self) -> int:
        """How many of them, the first ones, the last cut kept. 0 if there was no cut."""
        return len(self._kept)

    @property
    def cuts(self) -> tuple[Cut, ...]:
        return tuple(self._cuts)

    @property
    def tokens_since_cut(self) -> Tokens:
        """The history after `kept_tokens`."""
        return self._since_cut

    def copy(self) -> Conversation:
        """As it is now."""
        same = Conversation(self.session_id)
        same._cuts, same._kept, same._since_cut = list(self._cuts), self._kept, self._since_cut
        return same

    def extend(self, token_ids: Any) -> None:
        """Tokens ``[token]`` follow."""
        self._since_cut = np.concatenate([self._since_cut, np.asarray(token_ids).astype(np.uint32)])

    def truncate(self, keep: Sequence[tuple[int, int]]) -> None:
        """Only these ranges of tokens stay, (first, count) each: ascending, disjoint, inside the history.

        With no range the conversation is `reset`. Raises InvalidRequest.
        """
        if not keep:
            self.reset()
            return
        kept = tuple((first, count) for first, count in kept_ranges(keep, self.token_count).tolist())
        if kept == ((0, self.token_count),):
            return
        left = self.token_ids[kept_tokens(kept)]
        self._cuts.append(Cut(self._since_cut, kept))
        self._kept, self._since_cut = left, _NOTHING

    def reset(self) -> None:
        """Forget all tokens: later ones are computed without them."""
        self._cuts, self._kept, self._since_cut = [], _NOTHING, _NOTHING

    def is_prefix_of(self, token_ids: NDArray[Any]) -> bool:
        """Whether the tokens begin with this history."""
        return len(token_ids) >= self.token_count and bool((token_ids[: self.token_count] == self.token_ids).all())

    def parent(self, keys: Keys) -> bytes:
        """The key that the first block since the last cut continues."""
        parent = keys.root
        for cut in self._cuts:
            chain = keys.chain(cut.tokens, parent, with_partial=True)
            parent = cut_key(chain.keys[-1] if len(chain) else parent, cut.kept_ranges)
        return parent

    def is_of(self, state: SessionState, keys: Keys) -> bool:
        """Whether the session's history is the beginning of this conversation, cut as it was."""
        since = state.token_count - self.kept_tokens
        if state.cuts != len(self._cuts) or not 0 <= since <= len(self._since_cut):
            return False
        chain = keys.chain(self._since_cut[:since], self.parent(keys), with_partial=True)
        listed = tuple(each.key for each in state.slices[len(state.slices) - len(chain) :])
        closed = chain[: len(chain) - bool(state.tail_tokens)]
        return listed == chain.keys and state.tip == (closed.keys[-1] if len(closed) else closed.parent)


_NOTHING = np.empty(0, np.uint32)
