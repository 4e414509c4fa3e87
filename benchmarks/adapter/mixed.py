"""The mixed plan on a real model: the history's head is computed while its tail is loaded over a slow link.

The link is as fast as the model: loading the history and computing it again take the same time, so that doing
both halves it. The benchmark calls the connector as an engine does; the connector chooses the plan.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch

from benchmarks.adapter import rig
from benchmarks.adapter.report import Section
from examples.models import load_model
from kvservice_adapter.connectors.transformers import Restored, TransformersConnector
from kvservice_adapter.rates import Rates
from kvservice_api.cost import Kind, Plan
from kvservice_client import Client

_BLOCK_TOKENS = 64
_WAIT_S = 60.0  # No wait may end by a timeout here.


class Turn(NamedTuple):
    seconds: float  # From the prompt to its logits.
    token: int  # The first of the answer.
    plan: Plan | None


class Rig:
    """A model, and a prompt whose history is in the daemon."""

    def __init__(self, model: Any, history_tokens: int, new_tokens: int) -> None:
        self.model = model
        self.prompt = rig.some_tokens(model, history_tokens + new_tokens, seed=1)
        self.history_tokens = history_tokens

    def connector(self, client: Client, rates: Rates) -> TransformersConnector:
        return TransformersConnector(
            client,
            self.model,
            model_id="bench/mixed",
            model_revision="1",
            block_tokens=_BLOCK_TOKENS,
            wait_s=_WAIT_S,
            save_wait_s=_WAIT_S,
            rates=rates,
        )

    def save(self, connector: TransformersConnector) -> None:
        """Prefill the whole prompt, and save it. The connector measures the time."""
        cache = connector.restore(self.prompt).cache
        rig.forward(self.model, self.prompt, cache)
        saved = connector.save(self.prompt, cache)
        assert saved.error is None and not saved.refused, saved
        assert connector.flush(_WAIT_S)

    def loaded(self, client: Client) -> Turn:
        """Answer the prompt with a connector without measurements: it loads all KV."""
        with self.connector(client, Rates()) as connector:
            turn = self.turn(connector)
        assert turn.plan is not None and turn.plan.kind is Kind.LOAD
        return turn

    def turn(self, connector: TransformersConnector | None) -> Turn:
        """Answer the prompt; with None as connector, without the daemon."""
        restored: list[Restored] = []

        def run() -> torch.Tensor:
            if connector is None:
                return rig.forward(self.model, self.prompt, None)
            restored.append(connector.restore(self.prompt))
            cache = restored[0].cache
            return rig.forward(self.model, self.prompt[:, cache.get_seq_length() :], cache)

        logits: list[torch.Tensor] = []
        seconds = rig.seconds(lambda: logits.append(run()))
        plan = None
        if restored:
            assert restored[0].error is None, restored[0].error
            plan = restored[0].plan
        return Turn(seconds, int(logits[0].argmax()), plan)


def measure(*, quick: bool) -> Section:
    """Medians of rounds; each round runs every plan once."""
    with rig.a_core_for_loading():
        return _measure(quick=quick)


def _measure(*, quick: bool) -> Section:
    loaded = None if quick else load_model()
    model = rig.random_model(rig.QUICK_SHAPE) if loaded is None else loaded.model
    name = "A Llama with random weights" if loaded is None else loaded.model_id
    history_tokens, new_tokens, rounds = (512, 40, 5) if quick else (1024, 40, 7)
    subject = Rig(model, history_tokens, new_tokens)
    learned = Rates()
    with rig.daemon(dram_bytes=1 << 30) as address:
        with Client(address, name="adapter bench") as client, subject.connector(client, Rates()) as connector:
            subject.save(connector)
            bytes_per_token = connector.layout.bytes_per_token
        alone_s = rig.median([subject.turn(None).seconds for _ in range(3)])
        rate = history_tokens * bytes_per_token / alone_s
        with (
            Client(address, name="adapter bench", timeout_s=_WAIT_S, throttle_bytes_per_s=rate) as client,
            subject.connector(client, learned) as connector,
        ):
            _learn(subject, connector, alone_s)
            found: dict[Kind, list[Turn]] = {kind: [] for kind in Kind}
            for number in range(rounds):
                turns = [
                    (Kind.RECOMPUTE, partial(subject.turn, None)),
                    (Kind.LOAD, partial(subject.loaded, client)),
                    (Kind.MIXED, partial(subject.turn, connector)),
                ]
                for kind, turn in turns[number % 3 :] + turns[: number % 3]:
                    found[kind].append(turn())
    assert len({turn.token for turns in found.values() for turn in turns}) == 1, "the answers differ"
    return _section(found, name, rate, history_tokens, new_tokens)


def _learn(subject: Rig, connector: TransformersConnector, alone_s: float) -> None:
    """Give the connector its measurements: one prefill of the prompt, and one load over this link."""
    connector.rates.observe_prefill(subject.prompt.shape[1], 0, alone_s)
    first = subject.turn(connector)
    assert first.plan is not None and first.plan.kind is Kind.LOAD, "the connector has not measured a load"


def _section(found: dict[Kind, list[Turn]], name: str, rate: float, history_tokens: int, new_tokens: int) -> Section:
    section = Section(
        "mixed",
        "Load, recompute, or both",
        f"{name} ({torch.get_num_threads()} thread of its own) answers a prompt of {history_tokens} stored and "
        f"{new_tokens} new tokens, over a transport throttled to {rate / 1e6:.1f} MB/s: loading the history takes as "
        "long as computing it. Times end with the first token's logits. A connector without measurements makes the "
        "pure loads; a connector with measurements decides on the mixed plan.",
    )
    plans = [turn.plan for turn in found[Kind.MIXED] if turn.plan is not None]
    mixed = [turn.seconds for turn, plan in zip(found[Kind.MIXED], plans, strict=True) if plan.kind is Kind.MIXED]
    medians = {kind: rig.median([turn.seconds for turn in found[kind]]) for kind in (Kind.RECOMPUTE, Kind.LOAD)}
    medians[Kind.MIXED] = rig.median(mixed) if mixed else float("nan")
    for kind, seconds in medians.items():
        expected = [plan.estimate_s[kind] for plan in plans if kind in plan.estimate_s]
        section.add(f"{kind}_ms", seconds * 1e3, note=f"expected {rig.median(expected) * 1e3:.4g}" if expected else "")
    gain = 1 - medians[Kind.MIXED] / min(medians[Kind.LOAD], medians[Kind.RECOMPUTE])
    section.add("mixed_gain", gain, "at least 0.1", "time saved against the faster of the other two")
    section.add("mixed_decided", len(mixed) / len(plans), "1", "share of the decisions for the mixed plan")
    section.add("computed_tokens", rig.median([float(plan.compute_tokens) for plan in plans]), note="of the history")
    return section
