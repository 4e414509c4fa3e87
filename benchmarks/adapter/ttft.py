"""The time to the first token per turn, with and without the connector (PAPER T18).

Conversations are cut out of a text, so that every round and every way sees the same tokens. Each turn runs
every way once, in rotating order. A way restores at a turn what it saved at the turn before.
"""

from __future__ import annotations

import itertools
import pydoc_data.topics
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch

from benchmarks.adapter import rig
from benchmarks.adapter.report import Section
from examples.models import load_model
from kvservice_adapter.connectors.transformers import TransformersConnector
from kvservice_client import Client

_THROTTLE_BYTES_PER_S = 50e6
_LONG_TOKENS = 1000  # The goal holds from this length of history on.
_SLOWER_SHARE, _SLOWER_S = 0.05, 0.010
_SAVE_S = 60.0
# New tokens per turn, with the answer to the turn before.
_TURNS = (180, 34, 250, 60, 400, 120, 40, 64, 48)
_PLAIN, _SLOW = "plain", "slow"


class Turn(NamedTuple):
    """One turn of one conversation."""

    conversation: int
    number: int
    history_tokens: int


class Way:
    """One way to answer: None of the connector, or the connector over one transport."""

    def __init__(self, model: Any, connector: TransformersConnector | None) -> None:
        self._model = model
        self._connector = connector

    def answer(self, prompt: torch.Tensor, session_id: str) -> tuple[float, int]:
        """Seconds from the prompt to the first token, and that token. Then the turn is saved, which is not timed."""
        began_s = time.perf_counter()
        cache = None
        if self._connector is not None:
            cache = self._connector.restore(prompt, session_id=session_id).cache
        output = self._model.generate(
            prompt, attention_mask=torch.ones_like(prompt), past_key_values=cache, max_new_tokens=1, do_sample=False
        )
        taken_s = time.perf_counter() - began_s
        if self._connector is not None:
            assert cache is not None
            saved = self._connector.save(prompt, cache, session_id=session_id, wait_s=_SAVE_S)
            assert saved.error is None, saved.error
            assert self._connector.flush(_SAVE_S)
        return taken_s, int(output[0, -1])


def measure(*, quick: bool) -> Section:
    loaded = load_model()
    turns, conversation_count, rounds = (_TURNS, 1, 3) if quick else (_TURNS, 5, 7)
    conversations = list(_conversations(loaded.tokenizer, conversation_count + 1, sum(turns)))
    layers = loaded.model.config.num_hidden_layers
    found: dict[tuple[str, Turn], list[float]] = defaultdict(list)
    tokens: dict[Turn, set[int]] = defaultdict(set)
    with ExitStack() as stack:
        address = stack.enter_context(rig.daemon(dram_bytes=3 << 30))
        ways = {_PLAIN: Way(loaded.model, None)}
        for name, client in {
            "shm": Client(address, name="adapter bench", transport="shm"),
            "grpc": Client(address, name="adapter bench", transport="grpc"),
            _SLOW: Client(address, name="adapter bench", throttle_bytes_per_s=_THROTTLE_BYTES_PER_S),
        }.items():
            stack.enter_context(client)
            connector = TransformersConnector(
                client,
                loaded.model,
                model_id=loaded.model_id,
                model_revision=loaded.model_revision,
                salt=name.encode(),
            )
            ways[name] = Way(loaded.model, stack.enter_context(connector))
        order = itertools.cycle(ways)
        _hold(ways, order, conversations.pop(), turns, conversation_count, "warm-up", defaultdict(list), tokens, 100)
        tokens.clear()
        first_tokens = itertools.count(101)
        for number in range(rounds):
            for index, ids in enumerate(conversations):
                _hold(ways, order, ids, turns, index, f"round-{number}-{index}", found, tokens, next(first_tokens))
    section = Section(
        "ttft",
        "Time to the first token",
        f"{loaded.model_id} ({layers} layers, fp32, {torch.get_num_threads()} threads), {conversation_count} "
        f"conversations of {len(turns)} turns with {min(turns)} to {max(turns)} new tokens each: from the call with "
        "the prompt to the first token, `restore` included; with the connector over `shm`, over `grpc`, and over a "
        f"link throttled to {_THROTTLE_BYTES_PER_S / 1e6:.0f} MB/s (`slow`), against the model alone. Each figure is "
        f"a median of {rounds} rounds, in which the order rotates, after one conversation to warm up. The daemon has "
        "the same cores.",
    )
    _fill(section, found, len(turns), is_identical=all(len(each) == 1 for each in tokens.values()))
    return section


def _hold(
    ways: dict[str, Way],
    order: Iterator[str],
    ids: torch.Tensor,
    turns: tuple[int, ...],
    conversation: int,
    session_id: str,
    found: dict[tuple[str, Turn], list[float]],
    tokens: dict[Turn, set[int]],
    first_token: int,
) -> None:
    """One conversation, in every way at once. Each begins with a token of its own, so that nothing is stored yet."""
    ids = torch.cat([torch.tensor([[first_token]]), ids[:, 1:]], 1)
    history = 0
    for number, new in enumerate(turns):
        turn = Turn(conversation, number, history)
        history += new
        first_tokens = set()
        for name in itertools.islice(order, len(ways)):
            taken_s, token = ways[name].answer(ids[:, :history], f"{name}/{session_id}")
            found[name, turn].append(taken_s)
            first_tokens.add(token)
        tokens[turn] |= {0} if len(first_tokens) == 1 else first_tokens
        next(order)


def _fill(section: Section, found: dict[tuple[str, Turn], list[float]], turn_count: int, *, is_identical: bool) -> None:
    medians = {each: rig.median(taken) for each, taken in found.items()}
    turns = sorted({turn for _, turn in medians})
    ways = [name for name in dict.fromkeys(name for name, _ in medians) if name != _PLAIN]
    section.add("first_tokens_identical", is_identical, "true")
    for name in sorted(ways):
        cuts = [
            1 - medians[name, turn] / medians[_PLAIN, turn] for turn in turns if turn.history_tokens >= _LONG_TOKENS
        ]
        if cuts:
            goal = "at least 0.85" if name != _SLOW else ""
            note = f"turns with {_LONG_TOKENS}+ tokens of history; the lowest of them {min(cuts):.3f}"
            section.add(f"{name}_cut", rig.median(cuts), goal, note)
    for name in sorted(ways):
        excess = {turn: _excess_s(medians[name, turn], medians[_PLAIN, turn]) for turn in turns}
        worst = max(turns, key=excess.__getitem__)
        note = f"turn {worst.number + 1}: {medians[name, worst] * 1e3:.0f} ms, {medians[_PLAIN, worst] * 1e3:.0f} alone"
        section.add(f"{name}_slower_turns", sum(each > 0 for each in excess.values()), "0", f"worst is {note}")
    for number in range(turn_count):
        of_turn = [turn for turn in turns if turn.number == number]
        times = {name: rig.median([medians[name, turn] for turn in of_turn]) for name in (_PLAIN, *sorted(ways))}
        others = ", ".join(f"{name} {times[name] * 1e3:.0f}" for name in sorted(ways))
        note = f"{of_turn[0].history_tokens} tokens of history; {others}"
        section.add(f"turn_{number + 1}_plain_ms", times[_PLAIN] * 1e3, note=note)


def _excess_s(taken_s: float, plain_s: float) -> float:
    """The seconds by which a turn exceeds its limit."""
    return taken_s - plain_s - max(_SLOWER_SHARE * plain_s, _SLOWER_S)


def _conversations(tokenizer: Any, count: int, tokens: int) -> Iterator[torch.Tensor]:
    """Texts of the library reference, concatenated and cut into conversations ``[1, token]``."""
    text = "\n\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False, verbose=False).input_ids
    for number in range(count):
        yield ids[:, number * tokens : (number + 1) * tokens]
