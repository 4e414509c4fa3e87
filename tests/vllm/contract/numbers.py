"""Numbers in place of a model's keys and values: each follows from the tokens up to its own, its layer, head and dim.

So every byte of a page can be checked, and a token that was sampled from pages with a wrong number is a wrong token.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

VOCABULARY = 1000

Numbers = npt.NDArray[np.float32]

_STATE_BITS = (1 << 21) - 1
_NUMBER_BITS = (1 << 22) - 1  # float32 keeps 24 bits exactly.


def states_of(tokens: Iterable[int], state: int = 0) -> npt.NDArray[np.int64]:
    """What a model would know after each token. `state` is the one before the first of them."""
    states = []
    for token in tokens:
        state = (state * 1_000_003 + token + 1) & _STATE_BITS
        states.append(state)
    return np.array(states, np.int64)


@dataclass(frozen=True)
class NumberedModel:
    """As many keys and values as a model of this shape has."""

    layers: int = 3
    kv_heads: int = 2
    head_dim: int = 32
    windows: tuple[int, ...] = ()  # The sliding window of each layer, 0 for none; empty if no layer has one.
    wide_dim: int = 0  # Of the heads in layers without a window, if it is another one.

    def window(self, layer: int) -> int:
        return self.windows[layer] if self.windows else 0

    def dim(self, layer: int) -> int:
        return self.head_dim if self.window(layer) or not self.wide_dim else self.wide_dim

    def seen(self, token: int, layer: int) -> int:
        """The first token that a token attends to."""
        window = self.window(layer)
        return max(0, token - window + 1) if window else 0

    def keys_and_values(self, states: npt.NDArray[np.int64], layer: int) -> tuple[Numbers, Numbers]:
        """Of the tokens after which these states are known, each ``[token, head, dim]``."""
        dim = self.dim(layer)
        place = np.arange(self.kv_heads * dim, dtype=np.uint32).reshape(self.kv_heads, dim)
        # Of products only the lowest bits are kept, so that they may overflow.
        mixed = states.astype(np.uint32)[:, None, None] * np.uint32(7919) + (place + layer * 512) * np.uint32(104_729)
        return (mixed & _NUMBER_BITS).astype(np.float32), (mixed * 31 + 1 & _NUMBER_BITS).astype(np.float32)

    def key_sums(self, states: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """The sum of each token's keys in the last layer. Numbers are whole and small: each sum of them is exact."""
        sums: npt.NDArray[np.float64] = self.keys_and_values(states, self.layers - 1)[0].sum((1, 2), np.float64)
        return sums

    def next_token(self, key_sum: float) -> int:
        """The token that follows, from the sum of the last layer's keys of all tokens that it attends to."""
        return int(key_sum) % VOCABULARY

    def generate(self, prompt: Sequence[int], count: int) -> list[int]:
        """The tokens that follow the prompt where all numbers are right."""
        states = states_of(prompt)
        state, sums = int(states[-1]), [0.0, *np.cumsum(self.key_sums(states)).tolist()]  # Of all keys before a token.
        tokens: list[int] = []
        for _ in range(count):
            first = self.seen(len(sums) - 2, self.layers - 1)
            tokens.append(self.next_token(sums[-1] - sums[first]))
            states = states_of(tokens[-1:], state)
            state = int(states[0])
            sums.append(sums[-1] + float(self.key_sums(states)[0]))
        return tokens
