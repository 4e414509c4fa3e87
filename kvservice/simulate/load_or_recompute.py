"""Whether a simulated request reads its history from SSD, computes it again, or both."""

from __future__ import annotations

from typing import NamedTuple

from kvservice.simulate.settings import Machine
from kvservice.simulate.ssd_channel import SsdChannel
from kvservice_api.cost import plan

#: The engine may compute up to a multiple of this many tokens while the rest is read: the daemon's default block.
_BLOCK_TOKENS = 256


class Read(NamedTuple):
    """What of a request's history on SSD is read, and what is computed meanwhile."""

    size_bytes: int
    computed_tokens: int


class LoadOrRecompute:
    """Asks `kvservice_api.cost.plan` with the rates of the machine: it fulfils `kvservice_api.cost.Costs`.

    A read takes as long as the requests' reads before it, and as its bytes need. Promotions and writes do not delay it.
    """

    def __init__(self, machine: Machine, channel: SsdChannel, block_tokens: int = 0) -> None:
        """`block_tokens` is the size of the workload's blocks, 0 if it has none."""
        self._channel = channel
        self._bytes_per_s = machine.ssd_bytes_per_s
        self._kv_bytes = machine.kv_bytes_per_token
        self._token_s = 1.0 / machine.prefill_tokens_per_s
        self._block_tokens = block_tokens or _BLOCK_TOKENS
        self._always_loads = machine.always_load
        self._backlog_s = 0.0

    def read(self, on_ssd_bytes: int, new_tokens: int) -> Read:
        """What a request reads of `on_ssd_bytes`, with `new_tokens` that it computes in any case."""
        history_tokens = on_ssd_bytes // self._kv_bytes
        if self._always_loads or not history_tokens:
            return Read(on_ssd_bytes, 0)
        self._backlog_s = self._channel.read_now_backlog_s()
        chosen = plan(self, history_tokens, new_tokens, self._kv_bytes, "ssd", self._block_tokens)
        if not chosen.load_tokens:
            return Read(0, history_tokens)
        return Read(on_ssd_bytes - chosen.compute_tokens * self._kv_bytes, chosen.compute_tokens)

    def overhead_s(self) -> float:
        return 0.0

    def load_s(self, size_bytes: int, tier: str, transport: str = "", loads_ahead: int = 0, /) -> float:
        """From now to the last byte."""
        return self._backlog_s + size_bytes / self._bytes_per_s

    def prefill_s(self, new_tokens: int, context_tokens: int = 0, /) -> float:
        """The model's GPU takes as long per token after a long context as after none."""
        return new_tokens * self._token_s
