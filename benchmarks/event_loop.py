"""When the daemon's event loop was late, and how much of it was its own doing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.host_pauses import Pause, paused_s

FLAGS = ("--log.level=debug",)
"""Of a daemon whose log has the lines that `late_beats` reads."""


@dataclass(frozen=True, slots=True)
class LateBeat:
    """A heartbeat of the event loop that was later than 10 ms, as the daemon's log has it. In seconds."""

    at_s: float  # By the monotonic clock.
    late_s: float
    own_s: float  # Without the time for which the loop's thread waited for a processor.
    paused_s: float  # For which the host did not run the processor of the loop's thread meanwhile.

    @property
    def charged_s(self) -> float:
        """What is judged: the delay, with waits for processors that clients and daemon share."""
        return self.late_s - self.paused_s


def late_beats(log: Iterable[dict[str, Any]], pauses: Sequence[Pause], begin_s: float, end_s: float) -> list[LateBeat]:
    """Those that were due in this time."""
    beats = list[LateBeat]()
    for line in log:
        if line["event"] == "the event loop was late" and begin_s <= line["at_s"] <= end_s:
            late_s = line["late_ms"] / 1000
            of_its_processor = (each for each in pauses if each.processor == line["processor"])
            paused = paused_s(of_its_processor, line["at_s"] - late_s, line["at_s"])
            beats.append(LateBeat(line["at_s"], late_s, line["own_ms"] / 1000, paused))
    return beats
