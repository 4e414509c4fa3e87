"""Small workloads and machines, written down by hand or drawn by Hypothesis."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from hypothesis import strategies as st

from kvservice.simulate.settings import Machine
from kvservice.simulate.workload import AFTER_ANSWER, Hints, Workload


class Request(NamedTuple):
    """One turn: at a time, or a think time after the answer before it."""

    session: int
    at_s: float = AFTER_ANSWER
    think_s: float = 0.0
    new_tokens: int = 30
    output_tokens: int = 20


def sessions(*requests: Request, context_tokens: int = 0, hints: Hints | None = None) -> Workload:
    """The requests of each session in their order; sessions by number."""
    ordered = sorted(requests, key=lambda request: request.session)
    return Workload(
        name="by hand",
        session=np.array([request.session for request in ordered], np.int32),
        arrives_s=np.array([request.at_s for request in ordered], np.float64),
        think_s=np.array([request.think_s for request in ordered], np.float64),
        new_tokens=np.array([request.new_tokens for request in ordered], np.int32),
        output_tokens=np.array([request.output_tokens for request in ordered], np.int32),
        hints=hints or Hints.none(),
        context_tokens=context_tokens,
    )


def paths(item_blocks: Sequence[int], *requests: tuple[float, Sequence[int]], block_tokens: int = 1) -> Workload:
    """Requests with their times and the items that they read."""
    count = len(requests)
    lengths = [len(path) for _, path in requests]
    return Workload(
        name="by hand",
        session=np.arange(count, dtype=np.int32),
        arrives_s=np.array([at_s for at_s, _ in requests], np.float64),
        think_s=np.zeros(count),
        new_tokens=np.array([sum(item_blocks[i] for i in path) * block_tokens for _, path in requests], np.int32),
        output_tokens=np.ones(count, np.int32),
        block_tokens=block_tokens,
        path_begins=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        path_items=np.array([item for _, path in requests for item in path], np.int32),
        item_blocks=np.array(item_blocks, np.int32),
    )


def machine(dram_bytes: int = 100, ssd_bytes: int = 1000, **others: Any) -> Machine:
    """One byte per token, ten bytes per second from SSD, one turn and a thousand prefill tokens per second.

    What is on SSD is read, although computing it would be a hundred times as fast.
    """
    settings: dict[str, Any] = {
        "ssd_bytes_per_s": 10.0,
        "kv_bytes_per_token": 1,
        "link_bytes_per_s": 1e9,
        "service_turns_per_s": 1.0,
        "prefill_tokens_per_s": 1000.0,
        "always_load": True,
    }
    return Machine(dram_bytes=dram_bytes, ssd_bytes=ssd_bytes, **(settings | others))


@st.composite
def session_workloads(draw: st.DrawFn, tokens: int = 60, context_tokens: int = 0) -> Workload:
    """Up to eight sessions with up to five turns, at times or after answers."""
    requests = []
    for session in range(draw(st.integers(1, 8))):
        at_s = draw(st.integers(0, 200)) / 4
        for turn in range(draw(st.integers(1, 5))):
            gap_s = draw(st.integers(1, 120)) / 4
            at_s += gap_s
            closed = turn > 0 and draw(st.booleans())
            requests.append(
                Request(
                    session,
                    math.nan if closed else at_s,
                    gap_s if closed else 0.0,
                    draw(st.integers(1, tokens)),
                    draw(st.integers(0, tokens // 2)),
                )
            )
    return sessions(*requests, context_tokens=context_tokens)


@st.composite
def path_workloads(draw: st.DrawFn) -> Workload:
    """Requests for paths in a small tree."""
    count = draw(st.integers(1, 9))
    parents = [-1] + [draw(st.integers(-1, item - 1)) for item in range(1, count)]
    blocks = [draw(st.integers(1, 4)) for _ in range(count)]
    ends = draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=25))
    requests = []
    for number, end in enumerate(ends):
        path = [end]
        while parents[path[0]] >= 0:
            path.insert(0, parents[path[0]])
        requests.append((number * draw(st.sampled_from([0.5, 1.0, 3.0])) if number else 0.0, path))
    requests.sort(key=lambda request: request[0])
    return paths(blocks, *requests)
