"""The load: conversations of a tiny model, in whole blocks, with think times of some seconds."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from kvservice.simulate.generate import people
from kvservice.simulate.settings import Machine
from kvservice.simulate.workload import AFTER_ANSWER, Workload
from kvservice_client import Layout

BLOCK_TOKENS = 16
#: Slices of 15 KiB: an image with its trailer has exactly 64 KiB.
LAYOUT = Layout(
    "benchmarks/placement", "float16", layers=4, kv_heads=4, k_head_dim=60, v_head_dim=60, block_tokens=BLOCK_TOKENS
)
BLOCK_BYTES = 64 * 1024
_TOKENS_PER_BLOCK = 40.0  # Of the answers that `people` gives: a query and its answer have 1 to 5 blocks, as a rule.
_QUERY_TOKENS = 8


@dataclass(frozen=True, slots=True)
class Scenario:
    """A load and the machine that serves it. Sizes in bytes, times in seconds."""

    sessions: int
    turns_for_s: float  # Sessions have as many turns as their think times need to fill this time.
    think_s: float  # Mean.
    start_blocks: float  # Mean blocks of a session's first prompt.
    service_turns_per_s: float
    dram_bytes: int
    ssd_bytes: int
    ssd_bytes_per_s: float
    prefill_tokens_per_s: float
    warmup_turns: int
    sends_queue: bool

    def slower(self, factor: float) -> Scenario:
        """The same turns in `factor` times the time, with rates that are lower by the same factor."""
        return replace(
            self,
            turns_for_s=self.turns_for_s * factor,
            think_s=self.think_s * factor,
            service_turns_per_s=self.service_turns_per_s / factor,
            ssd_bytes_per_s=self.ssd_bytes_per_s / factor,
            prefill_tokens_per_s=self.prefill_tokens_per_s / factor,
        )

    def machine(self, dram_bytes: int, ssd_bytes: int) -> Machine:
        """What the simulator simulates: tiers of so many usable bytes, and a server of the same fixed rate."""
        return Machine(
            dram_bytes=dram_bytes,
            ssd_bytes=ssd_bytes,
            ssd_bytes_per_s=self.ssd_bytes_per_s,
            kv_bytes_per_token=BLOCK_BYTES // BLOCK_TOKENS,
            service_turns_per_s=self.service_turns_per_s,
            prefill_tokens_per_s=self.prefill_tokens_per_s,
            always_load=True,
            reports_answers=self.sends_queue,
        )


def workload_of(scenario: Scenario, seed: int) -> Workload:
    """People whose think times follow their answers (`generate.people`), all of whom begin within one think time.

    A turn's prompt and its answer are whole blocks. The think times are scaled; their order is that of `people`.
    """
    drawn = people(
        users=scenario.sessions,
        user_rate=scenario.sessions / scenario.think_s,
        start_tokens=scenario.start_blocks * BLOCK_TOKENS,
        think_s=scenario.think_s,
        seed=seed,
    )
    rng = np.random.default_rng(seed)
    # A session lasts as long as the measurement: its turns are drawn again from all turns, each with its think time.
    later = np.flatnonzero(np.isnan(drawn.arrives_s))
    firsts = np.flatnonzero(~np.isnan(drawn.arrives_s))
    session, arrives, think, new, output = [], [], [], [], []
    for number, first in enumerate(firsts.tolist()):
        begins_s = float(drawn.arrives_s[first])
        at_s, turn = begins_s, first
        while at_s < scenario.turns_for_s:
            is_first = turn == first
            session.append(number)
            arrives.append(begins_s if is_first else AFTER_ANSWER)
            think.append(0.0 if is_first else float(drawn.think_s[turn]))
            blocks = max(1, round(int(drawn.new_tokens[turn]) / BLOCK_TOKENS)) if is_first else 0
            new.append(blocks * BLOCK_TOKENS + _QUERY_TOKENS)
            following = int(rng.choice(later))  # Its think time follows the answer before it, which is this turn's.
            answer = int(drawn.output_tokens[following - 1])
            output.append(max(1, round(answer / _TOKENS_PER_BLOCK)) * BLOCK_TOKENS - _QUERY_TOKENS)
            at_s += float(drawn.think_s[following]) + 1 / scenario.service_turns_per_s
            turn = following
    return replace(
        drawn,
        name="conversations",
        session=np.array(session, np.int32),
        arrives_s=np.array(arrives),
        think_s=np.array(think),
        new_tokens=np.array(new, np.int32),
        output_tokens=np.array(output, np.int32),
    )
