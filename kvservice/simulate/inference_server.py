"""Models of the inference server: one with a fixed rate, and one with prefill per turn and batched decoding."""

from __future__ import annotations

import math
from typing import Protocol

from kvservice.simulate.settings import Machine

#: The weight of the last turn in the moving average of the time per turn.
_LAST = 0.02


class InferenceServer(Protocol):
    """When a turn starts, and when its answer ends."""

    free_at_s: float  # When the server can take the next turn. Infinite while every place of the batch is used.
    turns_per_s: float  # The rate at which turns leave the queue.

    def take(self, now_s: float, loaded_s: float, prefill_s: float, output_tokens: int) -> tuple[float, float]:
        """Start a turn whose KV is loaded at `loaded_s`. Returns (start of its prefill, end of its answer), in s."""

    def finish(self) -> None:
        """An answer has ended: its place of the batch is free."""


class FixedRate:
    """Starts a turn every `1 / turns_per_s` seconds, independent of its cost: a server with enough GPUs."""

    def __init__(self, turns_per_s: float) -> None:
        self.turns_per_s = turns_per_s
        self._busy_s = 1.0 / turns_per_s
        self.free_at_s = -math.inf

    def take(self, now_s: float, loaded_s: float, prefill_s: float, output_tokens: int) -> tuple[float, float]:
        self.free_at_s = now_s + self._busy_s
        begins_s = max(now_s, loaded_s)
        return begins_s, begins_s + self._busy_s

    def finish(self) -> None:
        pass


class GpuServer:
    """Prefills one turn at a time, and decodes up to `batch` turns together at the same time.

    With `Machine.blocking_loads` it waits for the KV of the turn that it has started. Else turns start once their KV is
    loaded.
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

    def finish(self) -> None:
        self._places += 1
        self.free_at_s = self._prefilled_s


def server_of(machine: Machine) -> InferenceServer:
    """The model that `machine` selects: `FixedRate` if `service_turns_per_s` is set, else `GpuServer`."""
    if machine.service_turns_per_s is not None:
        return FixedRate(machine.service_turns_per_s)
    return GpuServer(machine.batch, machine.decode_tokens_per_s)
