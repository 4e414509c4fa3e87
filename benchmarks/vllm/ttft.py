"""The time to the first token of a real vLLM on the CPU, for histories that are stored.

    .venv-vllm/bin/python -m benchmarks.vllm.ttft [--histories 500 1500 3000] [--from-ssd] [--ways TEXT]

Each turn asks every way once, in rotated order: a request that is neither looked up nor saved, and the ways to load.
Prints a Markdown table of medians of the ratios to the first. The time is vLLM's own (`first_token_latency`); every
answer is compared with that of the first way. The histories are stored to their last token, and 24 new tokens follow.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from transformers import AutoTokenizer

from kvservice_client import BlockCache, block_chain
from tests.daemon import MIB, DaemonProcess, until
from tests.vllm.engine import NOT_KEPT, Engine, engine, model_folder, model_layout, transfer_config, wait_until_stored

HISTORIES = (500, 1500, 3000)
NEW_TOKENS = 24
TOKENS = 2  # Of an answer.
SESSION = "benchmark"  # Of what is stored. One way names it.
LAYOUT = model_layout(revision="benchmark")


class Way(NamedTuple):
    name: str
    kept: Mapping[str, Any]  # The connector's parameters of the request.
    prepare: Callable[[Sequence[int]], None] = lambda history: None


class Row(NamedTuple):
    way: str
    page_tokens: int
    history: int
    computed_s: float
    ratio: float
    loaded_tokens: int


def measure(
    vllm: Engine, stored: BlockCache, ways: Sequence[Way], text: Sequence[int], page_tokens: int, given: Namespace
) -> list[Row]:
    """The rows of one engine."""
    rows = []
    for history_tokens in given.histories:
        history = list(text[:history_tokens])
        chain = block_chain(LAYOUT, history, with_partial=True)
        if stored.contains(chain) < len(chain):
            vllm.answer(history, 1, may_load=False, session_id=SESSION)
            wait_until_stored(stored, history)
        prompt = [*history, *text[-NEW_TOKENS:]]
        all_ways = [Way("computed", NOT_KEPT), *ways]
        ratios: dict[str, list[float]] = {way.name: [] for way in ways}
        computed, loaded = [], {}
        for turn in range(given.repetitions):
            first = turn % len(all_ways)
            answers = {}
            for way in (*all_ways[first:], *all_ways[:first]):
                way.prepare(history)
                answers[way.name] = vllm.answer(prompt, TOKENS, **way.kept)
            base = answers["computed"]
            computed.append(base.first_token_s)
            for way in ways:
                answer = answers[way.name]
                assert answer.token_ids == base.token_ids, way.name
                ratios[way.name].append(answer.first_token_s / base.first_token_s)
                loaded[way.name] = answer.cached_tokens
        for way in ways:
            ratio = statistics.median(ratios[way.name])
            rows.append(
                Row(way.name, page_tokens, history_tokens, statistics.median(computed), ratio, loaded[way.name])
            )
            print(f"{rows[-1]}, load average {os.getloadavg()[0]:.1f}", flush=True)
    return rows


def run(given: Namespace, folder: Path) -> list[Row]:
    tokenizer = AutoTokenizer.from_pretrained(model_folder())
    lines = (
        f"The river of city {each} is {each * each % 89} miles long and meets river {each + 7}." for each in range(300)
    )
    text: list[int] = tokenizer.encode(" ".join(lines))
    rows = []
    settings = {"model_id": LAYOUT.model_id, "model_revision": LAYOUT.model_revision, "lookup_wait_s": 1.0}
    with (
        DaemonProcess(folder, dram__capacity_bytes=1024 * MIB, ssd__capacity_bytes=4096 * MIB) as daemon,
        daemon.client() as client,
    ):
        stored = client.open_layout(LAYOUT)

        def evict(history: Sequence[int]) -> None:
            """Leave the history's blocks on the SSD alone."""
            keys = set(block_chain(LAYOUT, history, with_partial=True).keys)

            def blocks() -> list[Any]:
                return [block for block in client.admin.list_blocks() if block.key in keys]

            until(lambda: all(block.on_ssd for block in blocks()))
            client.evict(keys, "dram")
            until(lambda: client.evict(keys, "dram").held == 0 and not any(block.in_dram for block in blocks()))

        def engine_of(page_tokens: int, transport: str, ways: Sequence[Way]) -> None:
            ways = [way for way in ways if given.ways in way.name]
            if not ways:
                return
            transfer = transfer_config(address=daemon.address, transport=transport, **settings)
            with engine(model_folder(), transfer, block_size=page_tokens) as vllm:
                rows.extend(measure(vllm, stored, ways, text, page_tokens, given))

        def by(name: str, mode: str, prepare: Callable[[Sequence[int]], None] = lambda history: None) -> Way:
            return Way(name, {"load": mode, "may_save": False}, prepare)

        whole, from_ssd = by("whole, shm", "whole"), by("whole, shm, from SSD", "whole", evict)
        if given.from_ssd:
            engine_of(128, "shm", [whole, from_ssd])
            return rows
        layers, between_steps = by("layers, shm", "layers"), by("between_steps, shm", "between_steps")
        kept = {"load": "whole", "may_save": False, "session_id": SESSION}
        named = Way("whole, shm, with session id", kept)
        engine_of(128, "shm", [whole, named, layers, between_steps, from_ssd])
        engine_of(128, "grpc", [by("whole, gRPC", "whole")])
        for page_tokens in (32, 64):
            engine_of(page_tokens, "shm", [whole])
    return rows


def table(rows: Sequence[Row]) -> str:
    lines = [
        "| way | page | history | loaded | computed | to the first token, of computed |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {row.way} | {row.page_tokens} | {row.history:,} | {row.loaded_tokens:,} | {row.computed_s:.2f} s "
        f"| {row.ratio:.3f} |"
        for row in rows
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--histories", type=int, nargs="+", default=HISTORIES)
    parser.add_argument("--from-ssd", action="store_true", help="only hits on SSD, and in DRAM beside them")
    parser.add_argument("--ways", default="", help="only ways with this in their names; by default all")
    given = parser.parse_args()
    if given.repetitions < 1:
        parser.error("--repetitions must be at least 1")
    loads, began_s = [os.getloadavg()[0]], time.monotonic()
    with tempfile.TemporaryDirectory(prefix="kvservice-ttft-") as folder:
        rows = run(given, Path(folder))
    loads.append(os.getloadavg()[0])
    print(
        f"\n{datetime.now(UTC):%d %B %Y}, {os.cpu_count()} cores, load average {loads[0]:.1f} at the start and "
        f"{loads[1]:.1f} at the end, medians of {given.repetitions}, {time.monotonic() - began_s:.0f} s\n"
    )
    print(table(rows))


if __name__ == "__main__":
    main()
