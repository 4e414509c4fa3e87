"""A queue of conversations, whose histories are all on SSD, and a third of them in DRAM."""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from kvservice_client import Client, Layout, block_chain
from tests.daemon import MIB, DaemonProcess, until

NEW_TOKENS = 24  # Of the person, per turn.
ANSWER_TOKENS = 4
_VOCABULARY = 40_000  # Token ids of SmolLM2 below its special ones.


class Way(NamedTuple):
    """How the requests of a queue are served."""

    name: str
    policy: str  # The daemon's `mover.policy`; empty: every history is computed again.
    hints: bool = True  # Whether the daemon acts on the queue that the engine reports.
    ready_first: bool = False  # Else first come, first served.


class Prompt(NamedTuple):
    name: str  # Of the request.
    session_id: str  # Of the conversation.
    token_ids: list[int]


class Served(NamedTuple):
    ttft_s: float  # From the arrival in the queue to the first token.
    answer: list[int]
    tier: str = ""  # Where its history was when the engine decided to load it: "dram", "ssd", "mixed"; or empty.
    load_s: float = 0.0  # How long its load took, beside other work or not.


class Engine(Protocol):
    """A model, and a connector on the daemon."""

    name: str
    layout: Layout

    def store(self, session_id: str, token_ids: list[int]) -> None:
        """Compute tokens, and store all their blocks and the session."""

    def disconnect(self) -> None:
        """The daemon will be stopped."""

    def connect(self) -> None:
        """The daemon was started again: return once blocks are loaded from it."""

    def serve(self, prompts: Sequence[Prompt], way: Way) -> list[Served]:
        """Answer prompts that come at the same time, in this order, and store what is new."""


class Size(NamedTuple):
    conversations: int
    history_tokens: int  # Of each, at the beginning.
    turns: int
    rounds: int

    @property
    def conversation_tokens(self) -> int:
        """Of one, at the end."""
        return self.history_tokens + self.turns * (NEW_TOKENS + ANSWER_TOKENS)


def settings_of(size: Size, layout: Layout) -> dict[str, Any]:
    """A daemon's capacities: DRAM for a third of the conversations, SSD for all."""
    all_bytes = size.conversations * size.conversation_tokens * layout.bytes_per_token
    return {"dram__capacity_bytes": all_bytes // 3, "ssd__capacity_bytes": 2 * all_bytes + 64 * MIB}


class Runs:
    """The runs of one engine. `results` has a list of requests per way and round."""

    def __init__(self, engine: Engine, daemon: DaemonProcess, client: Client, size: Size) -> None:
        self._engine, self._daemon, self._client, self._size = engine, daemon, client, size
        chooser = random.Random(1)
        self._chooser = chooser
        self._histories = [self._tokens(size.history_tokens) for _ in range(size.conversations)]
        self._news = [[self._tokens(NEW_TOKENS) for _ in range(size.conversations)] for _ in range(size.turns)]
        self._orders = [chooser.sample(range(size.conversations), size.conversations) for _ in range(size.turns)]
        self._answers: dict[str, list[int]] = {}  # By prompt: as the first run answered it.
        self.differing = 0  # Answers that were not the same as in the first run.
        self.results: dict[Way, list[list[Served]]] = {}

    def run(self, ways: Sequence[Way]) -> None:
        """All ways in every round, in rotated order."""
        for number, history in enumerate(self._histories):
            self._engine.store(_session_id(number), history)
        kept = {block.key for block in self._client.admin.list_blocks()}
        until(lambda: all(block.on_ssd for block in self._client.admin.list_blocks()), 600.0)
        for number in range(self._size.rounds):
            first = number % len(ways)
            for way in (*ways[first:], *ways[:first]):
                if way.policy:
                    self._prepare(way, kept)
                served = self._serve(way)
                self.results.setdefault(way, []).append(served)
                mean_s = sum(each.ttft_s for each in served) / len(served)
                print(f"{self._engine.name}, round {number + 1}, {way.name}: mean {mean_s:.2f} s", file=sys.stderr)

    def _prepare(self, way: Way, kept: set[bytes]) -> None:
        """Start the daemon with the way's policy. It has the first histories alone, the last third of them in DRAM."""
        self._engine.disconnect()
        self._daemon.stop()
        self._daemon.settings |= {"mover.policy": way.policy, "hints.dram_share": 0.5 if way.hints else 0.0}
        self._daemon.start()
        self._engine.connect()
        admin = self._client.admin
        until(lambda: admin.status().leases == 0)
        admin.discard({block.key for block in admin.list_blocks()} - kept)
        for number, history in enumerate(self._histories):
            session = self._client.session(self._engine.layout, _session_id(number))
            session.end()
            session.append(block_chain(self._engine.layout, history, with_partial=True))
        until(lambda: self._client.evict(kept, "dram").held == 0)
        last = range(self._size.conversations)[-(self._size.conversations // 3) :]
        sessions = [self._client.session(self._engine.layout, _session_id(number)) for number in last]
        self._client.prefetch(sessions=sessions, wait=True)

    def _serve(self, way: Way) -> list[Served]:
        histories, found = list(self._histories), list[Served]()
        for turn, order in enumerate(self._orders):
            prompts = [
                Prompt(f"{turn}-{each}", _session_id(each), histories[each] + self._news[turn][each]) for each in order
            ]
            served = self._engine.serve(prompts, way)
            for each, prompt, result in zip(order, prompts, served, strict=True):
                answer = self._answers.setdefault(prompt.name, result.answer)
                self.differing += answer != result.answer
                histories[each] = prompt.token_ids + answer
            found += served
        return found

    def _tokens(self, count: int) -> list[int]:
        return [self._chooser.randrange(_VOCABULARY) for _ in range(count)]


def _session_id(conversation: int) -> str:
    return f"conversation-{conversation}"
