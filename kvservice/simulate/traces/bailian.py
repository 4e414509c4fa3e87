"""Qwen-Bailian's format: one JSON object per line, a request that names the request before it.

``{"chat_id": int, "parent_chat_id": int, "timestamp": seconds, "input_length": tokens, "output_length": tokens,
"type": str, "turn": int, "hash_ids": [int, ...]}``

The parent of a conversation's first request is -1. Lengths are of the whole prompt, with the history. A block has 16
tokens, and an id is of its content alone, so that an id may follow different blocks.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from kvservice.simulate.traces.jsonl import parse
from kvservice.simulate.traces.lines import TOKENS_MAX, BadLine, Lines, seconds, shown, whole_number
from kvservice.simulate.traces.mooncake import read_requests, shared_prefixes
from kvservice.simulate.traces.turn_columns import view
from kvservice.simulate.traces.whole_prompts import WholePrompts
from kvservice.simulate.workload import Workload

FIELDS = frozenset(("chat_id", "parent_chat_id"))
BLOCK_TOKENS = 16


def read_chats(lines: Lines, text: Iterable[str]) -> Workload:
    """A workload of sessions: the chains of requests and their parents.

    The first request that names a parent continues the parent's session. Each further one is a branch: a session of its
    own, whose history is computed again. So are a request with a parent before the trace, and one that is shorter than
    half of its parent. Lines ascend in time. Raises TraceError.
    """
    prompts = WholePrompts()
    session_of: dict[int, int] = {}  # Chat id of a request without a child -> its session.
    chats: set[int] = set()
    branches = 0
    now_s = 0.0
    for line in text:
        try:
            row = parse(line)
            now_s = seconds("timestamp", row.get("timestamp"), now_s)
            prompt_tokens = whole_number("input_length", row.get("input_length"), TOKENS_MAX)
            answer_tokens = whole_number("output_length", row.get("output_length"), TOKENS_MAX)
            chat, parent = _id("chat_id", row.get("chat_id")), _id("parent_chat_id", row.get("parent_chat_id"))
            if chat in chats:
                raise BadLine(f"chat_id {chat} comes twice")
        except BadLine as error:
            raise lines.refusal(error) from None
        session = session_of.pop(parent, -1)
        if session >= 0 and not prompts.was_cut(session, prompt_tokens):
            prompts.follow(session, now_s, prompt_tokens, answer_tokens)
        else:
            branches += session < 0 and parent in chats
            session = prompts.begin(now_s, prompt_tokens, answer_tokens)
        chats.add(chat)
        session_of[chat] = session
    notes = (f"Branches of conversations, which are sessions of their own: {branches:,}.",) if branches else ()
    return prompts.turns.workload(lines.path, notes=notes)


def read_prefixes(lines: Lines, text: Iterable[str], *, block_tokens: int = BLOCK_TOKENS) -> Workload:
    """A workload of shared prefixes. Lines ascend in time. Raises TraceError."""
    requests = read_requests(lines, text, block_tokens, 1.0)
    chained = _chained(view(requests.begins, np.int64), view(requests.hash_ids, np.int64))
    requests.hash_ids = array("q", chained.tobytes())
    return shared_prefixes(lines, requests, block_tokens)


def _id(name: str, value: object) -> int:
    if type(value) is not int:
        raise BadLine(f"{name} must be a whole number, not {shown(value)}")
    return value


def _chained(begins: NDArray[np.int64], ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """Ids that name a block and all blocks before it: hashes of 63 bits of the blocks' own ids."""
    lengths = np.diff(begins)
    longest_first = np.argsort(-lengths, kind="stable")
    starts, lengths = begins[:-1][longest_first], lengths[longest_first]
    content = ids.astype(np.uint64)
    state = np.zeros(len(starts), np.uint64)
    chained = np.empty(len(ids), np.int64)
    for position in range(int(lengths[0]) if len(lengths) else 0):
        count = np.searchsorted(-lengths, -position)  # Requests that are longer than `position` blocks.
        at = starts[:count] + position
        state[:count] = _mixed(state[:count] * np.uint64(0x9E3779B97F4A7C15) + content[at] + np.uint64(1))
        chained[at] = state[:count] >> np.uint64(1)
    return chained


def _mixed(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
