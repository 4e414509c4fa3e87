"""What ``kvctl trace record`` writes: a header, then one JSON object per line, a turn with the hashes of its blocks.

``{"kvservice_trace": 1, "block_tokens": tokens, "kv_bytes_per_token": bytes}``
``{"t": seconds, "prompt_tokens": int, "answer_tokens": int, "hash_ids": [int, ...]}``

A prompt's tokens include its history. An id identifies a whole block of prompt or answer, and all blocks before it.
Lines are in the order in which the turns ended.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from kvservice.simulate.traces.jsonl import parse
from kvservice.simulate.traces.lines import TOKENS_MAX, BadLine, Lines, TraceError, seconds, whole_number
from kvservice.simulate.traces.mooncake import HashedRequests, hash_ids_of, shared_prefixes
from kvservice.simulate.workload import Workload

FIELDS = frozenset(("kvservice_trace", "block_tokens", "kv_bytes_per_token"))
_VERSION = 1
_KV_BYTES_MAX = 2**30


def read_turns(lines: Lines, text: Iterable[str]) -> Workload:
    """A workload of shared prefixes, with the size of a token's KV. Raises TraceError."""
    rows = iter(text)
    block_tokens, kv_bytes_per_token = _header(lines, next(rows))
    read = sorted(_turns(lines, rows, block_tokens))
    if not read:
        raise TraceError(lines.path, None, "has no turn with a whole block")
    turns = HashedRequests()
    for arrives_s, number, prompt_tokens, answer_tokens, ids in read:
        turns.numbers.append(number)
        turns.arrives_s.append(arrives_s)
        turns.input_tokens.append(prompt_tokens)
        turns.output_tokens.append(answer_tokens)
        turns.hash_ids.extend(ids)
        turns.begins.append(len(turns.hash_ids))
    return replace(shared_prefixes(lines, turns, block_tokens), kv_bytes_per_token=kv_bytes_per_token)


def _header(lines: Lines, line: str) -> tuple[int, int]:
    try:
        row = parse(line)
        version = whole_number("kvservice_trace", row.get("kvservice_trace"), 2**31)
        if version != _VERSION:
            raise BadLine(f"kvservice_trace is {version}: this version reads {_VERSION}")
        block_tokens = whole_number("block_tokens", row.get("block_tokens"), TOKENS_MAX)
        kv_bytes = whole_number("kv_bytes_per_token", row.get("kv_bytes_per_token"), _KV_BYTES_MAX)
        if not block_tokens or not kv_bytes:
            raise BadLine("block_tokens and kv_bytes_per_token must be above 0")
    except BadLine as error:
        raise lines.refusal(error) from None
    return block_tokens, kv_bytes


def _turns(lines: Lines, rows: Iterator[str], block_tokens: int) -> Iterator[tuple[float, int, int, int, list[int]]]:
    """(arrival, line, tokens of prompt and answer, ids), of turns with whole blocks."""
    for line in rows:
        try:
            row = parse(line)
            arrives_s = seconds("t", row.get("t"), 0.0)
            prompt_tokens = whole_number("prompt_tokens", row.get("prompt_tokens"), TOKENS_MAX)
            answer_tokens = whole_number("answer_tokens", row.get("answer_tokens"), TOKENS_MAX)
            ids = hash_ids_of(row.get("hash_ids"))
            if len(ids) * block_tokens > prompt_tokens + answer_tokens:
                raise BadLine(f"hash_ids has {len(ids)} blocks, more than its tokens fill")
        except BadLine as error:
            raise lines.refusal(error) from None
        if ids:
            yield arrives_s, lines.number, prompt_tokens, answer_tokens, list(ids)
