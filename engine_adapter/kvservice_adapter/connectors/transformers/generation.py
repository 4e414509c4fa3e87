"""Where a row of a batch has ended, when `generate` computes it: a row that has ended is filled up with padding.

The padding is computed like any token, and nothing that a forward is given tells it apart. So the first forward of a
`generate` looks for it on the call stack, for what decides when a row ends: its end-of-sequence tokens, its padding
token, and whether there are other stopping criteria. Nothing is changed there. A loop of the caller's own has
none of this, and none of its rows are cut.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from types import FrameType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers.generation import utils
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria, MaxTimeCriteria

_FRAMES_MAX = 40


@dataclass(frozen=True, slots=True)
class Generation:
    """What ends the rows of one `generate`."""

    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None
    has_other_ends: bool  # Stop strings, or criteria of the caller's.

    def kept(self, generated: NDArray[Any]) -> int | None:
        """How many of a row's generated tokens ``[token]`` are before its last one. None if it has not ended.

        The last token is left out as in a row that runs to the end of the batch, whose last token is never
        computed. Where criteria other than end-of-sequence tokens may have ended the row, all padding at its end counts
        as such, though the model may have said some of it. Without any end-of-sequence token `generate` pads no row.
        """
        if not self.eos_token_ids:
            return None
        ends = np.flatnonzero(np.isin(generated, self.eos_token_ids))
        if len(ends):
            return int(ends[0])
        if not self.has_other_ends or self.pad_token_id is None:
            return None
        others = np.flatnonzero(generated != self.pad_token_id)
        count = int(others[-1]) + 1 if len(others) else 0
        return max(0, count - 1) if count < len(generated) else None


def running() -> Generation | None:
    """That of the `generate` that calls the model on this thread. None if there is none."""
    frame: FrameType | None = inspect.currentframe()
    for _ in range(_FRAMES_MAX):
        if frame is None:
            return None
        if frame.f_code.co_filename == utils.__file__ and "stopping_criteria" in frame.f_code.co_varnames:
            return _of(frame.f_locals)
        frame = frame.f_back
    return None


def hidden_token(generation_config: Any) -> int | None:
    """The token that `generate` hides where it is given no attention mask: the padding token, unless it ends rows."""
    pad = _ids(getattr(generation_config, "pad_token_id", None))
    if not pad or pad[0] in _ids(getattr(generation_config, "eos_token_id", None)):
        return None
    return pad[0]


def _of(variables: dict[str, Any]) -> Generation | None:
    config = variables.get("generation_config")
    if config is None:
        return None
    eos = _ids(getattr(config, "_eos_token_tensor", None))
    pad = _ids(getattr(config, "_pad_token_tensor", None))
    known = (EosTokenCriteria, MaxLengthCriteria, MaxTimeCriteria)
    criteria = variables.get("stopping_criteria") or ()
    return Generation(eos, pad[0] if pad else None, any(not isinstance(each, known) for each in criteria))


def _ids(value: Any) -> tuple[int, ...]:
    return () if value is None else tuple(int(each) for each in np.atleast_1d(np.asarray(value)).ravel())
