"""Mooncake's format: one JSON object per line, a request with the hashes of its prompt's blocks.

``{"timestamp": milliseconds, "input_length": tokens, "output_length": tokens, "hash_ids": [int, ...]}``

A block has 512 tokens; other tools write the format with blocks of another size. An id identifies a block and all
blocks before it. A prompt's last block may be partial.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable

import numpy as np

from kvservice.simulate.traces.jsonl import parse
from kvservice.simulate.traces.lines import TOKENS_MAX, BadLine, Lines, TraceError, seconds, shown, whole_number
from kvservice.simulate.traces.prefix import Contradiction, segments
from kvservice.simulate.traces.turn_columns import TurnColumns, view
from kvservice.simulate.workload import Workload

FIELDS = frozenset(("timestamp", "input_length", "output_length", "hash_ids"))
BLOCK_TOKENS = 512
_MS = 1e-3
# Requests with only the first block in common share a system prompt, not a conversation.
_BLOCKS_THAT_PROVE = 2


def read_prefixes(lines: Lines, text: Iterable[str], *, block_tokens: int = BLOCK_TOKENS) -> Workload:
    """A workload of shared prefixes. Raises TraceError."""
    return shared_prefixes(lines, read_requests(lines, text, block_tokens, _MS), block_tokens)


def shared_prefixes(lines: Lines, requests: HashedRequests, block_tokens: int) -> Workload:
    """A workload of the prefixes that requests share. Raises TraceError if an id names two prefixes."""
    begins = view(requests.begins, np.int64)
    try:
        path_begins, path_items, item_blocks = segments(begins, view(requests.hash_ids, np.int64))
    except Contradiction as error:
        first, second = requests.numbers[error.first], requests.numbers[error.second]
        there = "twice here" if first == second else f"after other blocks than in line {first}"
        reason = f"hash id {error.hash_id} comes {there}: an id names one prefix"
        raise TraceError(lines.path, second, reason) from None
    arrives = view(requests.arrives_s, np.float64)
    return Workload(
        name=lines.path.name,
        session=np.arange(len(arrives), dtype=np.int32),
        arrives_s=arrives - arrives[0],
        think_s=np.zeros(len(arrives)),
        new_tokens=view(requests.input_tokens, np.int32),
        output_tokens=view(requests.output_tokens, np.int32),
        block_tokens=block_tokens,
        path_begins=path_begins,
        path_items=path_items,
        item_blocks=item_blocks,
    )


def read_conversations(lines: Lines, text: Iterable[str], *, block_tokens: int = BLOCK_TOKENS) -> Workload:
    """A workload of sessions. The file has none, so they are derived from shared blocks.

    A request continues an earlier request if it contains the full blocks of that request's prompt, is long enough for
    its answer, and no other request continues it already. Of several candidates the one with the longest chain is
    taken, then the latest. The new tokens are those after the earlier answer. Raises TraceError.
    """
    requests = read_requests(lines, text, block_tokens, _MS)
    turns = TurnColumns()
    sessions = 0
    open_at: dict[int, list[int]] = {}  # A prompt's last full block -> the requests without a continuation.
    for number, arrives_s in enumerate(requests.arrives_s):
        begin, end = requests.begins[number], requests.begins[number + 1]
        tokens = requests.input_tokens[number]
        session, history = sessions, 0
        for at in range(end - 1, begin + _BLOCKS_THAT_PROVE - 2, -1):
            candidates = open_at.get(requests.hash_ids[at])
            if not candidates:
                continue
            before = candidates[-1]
            whole = requests.input_tokens[before] + requests.output_tokens[before]
            if whole <= tokens and requests.arrives_s[before] < arrives_s:
                candidates.pop()
                session, history = turns.session[before], whole
                break
        sessions += session == sessions
        turns.add(session, arrives_s, tokens - history, requests.output_tokens[number])
        full = tokens // block_tokens
        if full >= _BLOCKS_THAT_PROVE:
            open_at.setdefault(requests.hash_ids[begin + full - 1], []).append(number)
    return turns.workload(lines.path, notes=("The trace has no sessions: they were derived from shared blocks.",))


class HashedRequests:
    """Requests with the ids of their prompts' blocks, as columns: request `n` has the ids `begins[n]:begins[n + 1]`."""

    def __init__(self) -> None:
        self.numbers = array("i")  # Of lines.
        self.arrives_s = array("d")
        self.input_tokens = array("i")
        self.output_tokens = array("i")
        self.begins = array("q", [0])
        self.hash_ids = array("q")


def read_requests(lines: Lines, text: Iterable[str], block_tokens: int, per_unit_s: float) -> HashedRequests:
    """The requests of a file, with times in units of `per_unit_s` seconds. Raises TraceError."""
    requests = HashedRequests()
    now_s = 0.0
    for line in text:
        try:
            row = parse(line)
            now_s = seconds("timestamp", row.get("timestamp"), now_s, per_unit_s)
            input_tokens = whole_number("input_length", row.get("input_length"), TOKENS_MAX)
            output_tokens = whole_number("output_length", row.get("output_length"), TOKENS_MAX)
            hash_ids = _hash_ids(row.get("hash_ids"), input_tokens, block_tokens)
        except BadLine as error:
            raise lines.refusal(error) from None
        requests.numbers.append(lines.number)
        requests.arrives_s.append(now_s)
        requests.input_tokens.append(input_tokens)
        requests.output_tokens.append(output_tokens)
        requests.hash_ids.extend(hash_ids)
        requests.begins.append(len(requests.hash_ids))
    return requests


def _hash_ids(value: object, input_tokens: int, block_tokens: int) -> array[int]:
    ids = hash_ids_of(value)
    blocks = -(-input_tokens // block_tokens)
    if len(ids) != blocks:
        raise BadLine(
            f"hash_ids has {len(ids)} blocks; input_length {input_tokens} is {blocks} of {block_tokens} tokens:"
            f" blocks of another size need --block-tokens"
        )
    if not blocks:
        raise BadLine("input_length is 0: a request has a prompt")
    return ids


def hash_ids_of(value: object) -> array[int]:
    """The ids of a prompt's blocks. Raises BadLine."""
    if type(value) is not list or not {int}.issuperset(map(type, value)):
        raise BadLine(f"hash_ids must be a list of whole numbers, not {shown(value)}")
    if value and (min(value) < 0 or max(value) >= 2**63):
        raise BadLine("hash_ids must be from 0 to 2^63 - 1")
    return array("q", value)
