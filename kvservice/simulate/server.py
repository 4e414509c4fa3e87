"""Who is served when: a server with a fixed rate, and a GPU that prefills one turn at a time and decodes a batch."""

from __future__ import annotations

import math
from typing import Protocol

from kvservice.simulate.settings import Machine


class Server(Protocol):
    """Tells when the next turn's time comes and when its answer ends. Times never go back."""

    free_at_s: float  # When the first in the queue may be taken. Infinite until one that runs has ended.

    def take(self, now_s: float, loaded_s: float, prefill_s: float, output_tokens: int) -> tuple[float, float]:
        """Take a turn whose KV is loaded at `loaded_s`. Returns when its prefill begins and when its answer ends."""

    def ended(self, now_s: float) -> None:
        """An answer has ended."""

    def turns_per_s(self) -> float:
        """How fast a queue moves."""


class FixedRate:
    """Takes a turn every 1/S seconds, whatever it costs, as a server with enough GPUs behind it would."""

    def __init__(self, turns_per_s: float) -> None:
        self._turns_per_s = turns_per_s
        self._busy_s = 1.0 / turns_per_s
        self.free_at_s = -math.inf

    def take(self, now_s: float, loaded_s: float, prefill_s: float, output_tokens: int) -> tuple[float, float]:
        self.free_at_s = now_s + self._busy_s
        return loaded_s, loaded_s + self._busy_s

    def ended(self, now_s: float) -> None:
        pass

    def turns_per_s(self) -> float:
        return self._turns_per_s


def server_of(machine: Machine) -> Server:
    if machine.service_turns_per_s is not None:
        return FixedRate(machine.service_turns_per_s)
    raise NotImplementedError
