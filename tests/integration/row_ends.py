"""Makes the rows of a batch end at the places that a test chooses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from transformers import LogitsProcessor


class EndsRows(LogitsProcessor):
    """Row r generates `token` as its new token number steps[r], and none of `never` before."""

    def __init__(self, prompt_columns: int, steps: Mapping[int, int], token: int, never: Sequence[int]) -> None:
        self._prompt, self._steps, self._token, self._never = prompt_columns, steps, token, list(never)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        scores[:, self._never] = -torch.inf
        for row, step in self._steps.items():
            if input_ids.shape[1] - self._prompt == step:
                scores[row] = -torch.inf
                scores[row, self._token] = 0.0
        return scores
