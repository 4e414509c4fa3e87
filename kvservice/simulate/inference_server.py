"""Who is served when: a server with a fixed rate, and GPUs that prefill one turn at a time and decode a batch."""

from __future__ import annotations

import math
from typing import Protocol

from kvservice.simulate.settings import Machine

#: So many turns at a time are passed over while their KV is read.
CALLED_MAX = 8
#: The weight of the last turn in the mean of what a turn takes.
_LAST = 0.02


class InferenceServer(Protocol):
    """Tells when the next turn's time comes and when its answer ends."""

    free_at_s: float  # When the first in the queue may be taken. Infinite until one that runs has ended.
    turns_per_s: float  # How fast a queue moves.

    def take(self, now_s: float, loaded_s: float, prefill_s: float, output_tokens: int) -> tuple[float, float]:
        """Take a turn whose KV is there at `loaded_s`. Returns when its prefill begins and when its answer ends."""

    def ended(self) -> None:
        """An answer has ended."""


class FixedRate:
    """Takes a turn every 1/S seconds, whatever it costs, as a server with enough GPUs behind it would."""

    def __init__(self, turns_per_s: float) -> None:
        self.turns_per_s = turns_per_s
        self._busy_s = 1.0 / turns_per_s
        self.free_at_s = -math.inf

    def take(self, now_s: float, loaded_s: float, prefill_s: float, output_tokens: int) -> tuple[float, float]:
        self.free_at_s = now_s + self._busy_s
        begins_s = max(now_s, loaded_s)
        return begins_s, begins_s + self._busy_s

    def ended(self) -> None:
        pass


class GpuServer:
    """Prefill has the GPU for itself, one turn after the other; each turn then decodes in a place of the batch.

    The GPU waits for the KV of the turn that it has taken.
    """

    def __init__(self, batch: int, decode_tokens_per_s: float) -> None:
        self._places = self._batch = batch
        self._token_s = 1.0 / decode_tokens_per_s
        self._prefilled_s = -math.inf
        self._turn_s = math.nan
        self.free_at_s = -math.inf
        self.turns_per_s = math.inf

    def take(self, now_s: float, loaded_s: float, prefill_s: float, output_tokens: int) -> tuple[float, float]:
        begins_s = max(now_s, loaded_s)
        self._prefilled_s = begins_s + prefill_s
        ends_s = self._prefilled_s + output_tokens * self._token_s
        self._places -= 1
        self.free_at_s = self._prefilled_s if self._places else math.inf
        turn_s = max(self._prefilled_s - now_s, (ends_s - now_s) / self._batch)
        self._turn_s = turn_s if math.isnan(self._turn_s) else self._turn_s + _LAST * (turn_s - self._turn_s)
        self.turns_per_s = 1.0 / self._turn_s if self._turn_s else math.inf
        return begins_s, ends_s

    def ended(self) -> None:
        self._places += 1
        self.free_at_s = self._prefilled_s


def server_of(machine: Machine) -> InferenceServer:
    if machine.service_turns_per_s is not None:
        return FixedRate(machine.service_turns_per_s)
    return GpuServer(machine.batch, machine.decode_tokens_per_s)
