"""What a policy costs the daemon: its event loop's delay and its CPU, with many sessions and a steady load."""

from __future__ import annotations

import math
import re
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.policies.report import Section
from kvservice_client import BlockCache, BlockChain, Client, Durability, Layout, block_chain
from tests.daemon import MIB, DaemonProcess

_TOKENS = 16
_LAYOUT = Layout(
    "benchmarks/event-loop", "float16", layers=1, kv_heads=1, k_head_dim=64, v_head_dim=64, block_tokens=_TOKENS
)
_SESSIONS, _QUICK_SESSIONS = 100_000, 10_000
_TURNS_PER_S = 100
_MEASURED_S, _QUICK_S = 60.0, 10.0
_START_BLOCKS = 2
_SAVED_AT_ONCE = 256
_BUCKETS_S = (0.005, 0.01, 0.02, 0.05)
_GOAL_S = 0.02


@dataclass(frozen=True, slots=True)
class _Facts:
    """Counts of heartbeats up to each bucket's delay, and up to its own delay; the daemon's CPU seconds."""

    beats: dict[float, float]
    own: dict[float, float]
    cpu_s: float

    def later(self, before: _Facts, delay_s: float, *, own: bool = False) -> float:
        """Heartbeats since `before` that were later than this."""
        now, then = (self.own, before.own) if own else (self.beats, before.beats)
        return (now[math.inf] - then[math.inf]) - (now[delay_s] - then[delay_s])


def event_loop(quick: bool) -> Section:
    """100,000 sessions and 100 turns per second, with the policy without a thread and with the one that scans most."""
    sessions, for_s = (_QUICK_SESSIONS, _QUICK_S) if quick else (_SESSIONS, _MEASURED_S)
    section = Section(
        "placement-event-loop",
        "The event loop with many sessions",
        f"{sessions:,} sessions of {_START_BLOCKS} blocks, then {_TURNS_PER_S} turns per second for {for_s:g} s, each "
        "a lookup, a lease and a save of one block, of sessions in random order; DRAM has an eighth of the blocks. "
        "Delays are of the daemon's heartbeats. Its own are those without the time for which its thread waited for a "
        "processor.",
    )
    rows = []
    for policy in ("lru", "foresight"):
        before, after, turns = _run(policy, sessions, for_s)
        late = [after.later(before, each) for each in _BUCKETS_S]
        late.append(after.later(before, _GOAL_S, own=True))
        if policy == "foresight":
            section.at_most("heartbeats later than 20 ms under `foresight`", after.later(before, _GOAL_S), 0)
        beats = after.beats[math.inf] - before.beats[math.inf]
        cpu_ms = 1e3 * (after.cpu_s - before.cpu_s) / turns
        rows.append([f"`{policy}`", f"{turns:,}", f"{beats:,.0f}", *(f"{each:,.0f}" for each in late), f"{cpu_ms:.2f}"])
    columns = ["Policy", "Turns", "Heartbeats", *(f"later than {1e3 * each:g} ms" for each in _BUCKETS_S)]
    columns.append(f"its own, later than {1e3 * _GOAL_S:g} ms")
    section.table("", [*columns, "CPU per turn (ms)"], rows)
    return section


def _run(policy: str, sessions: int, for_s: float) -> tuple[_Facts, _Facts, int]:
    with tempfile.TemporaryDirectory(prefix="kvservice-event-loop-") as folder:
        daemon = DaemonProcess(
            Path(folder),
            mover__policy=policy,
            server__metrics_address="127.0.0.1:0",
            dram__capacity_bytes=(sessions * _START_BLOCKS * 8192) // 8 + 64 * MIB,
            index__volatile_map_bytes=64 * MIB,
            ssd__capacity_bytes=sessions * (_START_BLOCKS + 2) * 8192 + 128 * MIB,
            index__durable_map_bytes=128 * MIB,
        )
        try:
            daemon.start()
            with daemon.client("event-loop") as client:
                return _load(daemon, client, sessions, for_s)
        finally:
            daemon.remove()


def _load(daemon: DaemonProcess, client: Client, sessions: int, for_s: float) -> tuple[_Facts, _Facts, int]:
    blocks = client.open_layout(_LAYOUT)
    lengths = np.full(sessions, _START_BLOCKS)
    for start in range(0, sessions, _SAVED_AT_ONCE):
        _save(blocks, range(start, min(start + _SAVED_AT_ONCE, sessions)), lengths)
    written = -1.0
    while written != (written := client.admin.status().counters["written_behind_blocks"]):
        time.sleep(2.0)  # The daemon does not report the end of its write-behind.
    random, turns = np.random.default_rng(0), 0
    before, began_s = _facts(daemon), time.monotonic()
    while (passed_s := time.monotonic() - began_s) < for_s:
        if turns >= passed_s * _TURNS_PER_S:
            time.sleep(0.001)  # The next turn is not due.
            continue
        session = int(random.integers(sessions))
        with blocks.lookup(_chain(session, lengths)):
            lengths[session] += 1
            _save(blocks, [session], lengths)
        turns += 1
    return before, _facts(daemon), turns


def _chain(session: int, lengths: NDArray[np.int64]) -> BlockChain:
    first = session * 1_000
    return block_chain(_LAYOUT, range(first, first + int(lengths[session]) * _TOKENS))


def _save(blocks: BlockCache, sessions: Sequence[int], lengths: NDArray[np.int64]) -> None:
    size = _LAYOUT.slice_bytes(_LAYOUT.kv_heads, _TOKENS)
    chains = [_chain(session, lengths) for session in sessions]
    blocks.save_many([(chain, [bytes(size * len(chain.keys))]) for chain in chains], Durability.DRAM)


def _facts(daemon: DaemonProcess) -> _Facts:
    port = daemon.wait_for_log("serving")["metrics_port"]
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        text = answer.read().decode()
    beats, own = (
        {
            float(each): float(count)
            for each, count in re.findall(
                rf'^kvservice_event_loop_{name}_seconds_bucket\{{le="([^"]+)"\}} (\S+)$', text, re.MULTILINE
            )
        }
        for name in ("delay", "own_delay")
    )
    fields = Path(f"/proc/{daemon.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
    return _Facts(beats, own, (int(fields[11]) + int(fields[12])) / 100)
