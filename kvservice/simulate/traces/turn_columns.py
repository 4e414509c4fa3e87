"""Collects the turns and events of a trace, and groups them by session."""

from __future__ import annotations

from array import array
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvservice.policy.items import HINTS
from kvservice.simulate.traces.lines import TraceError
from kvservice.simulate.workload import Hints, Workload

NO_SESSIONS = "The trace has no sessions: every request is a session of one turn, so no policy can have hits."


class TurnColumns:
    """Turns in the order of their requests, as columns: 20 bytes per turn."""

    def __init__(self) -> None:
        self.session = array("i")  # Numbered by first appearance.
        self.arrives_s = array("d")
        self.new_tokens = array("i")
        self.output_tokens = array("i")

    def add(self, session: int, arrives_s: float, new_tokens: int, output_tokens: int) -> None:
        self.session.append(session)
        self.arrives_s.append(arrives_s)
        self.new_tokens.append(new_tokens)
        self.output_tokens.append(output_tokens)

    def workload(self, path: Path, events: EventColumns | None = None, notes: tuple[str, ...] = ()) -> Workload:
        """The turns as a workload, with times from the first request on.

        The turns of a session are sorted by time; turns at the same time keep their order. Raises TraceError if there
        are no turns.
        """
        if not self.session:
            raise TraceError(path, None, "has no turn")
        session, arrives = view(self.session, np.int32), view(self.arrives_s, np.float64)
        order = np.lexsort((arrives, session))
        number = None
        if (np.diff(arrives) < 0).any():
            first_s = arrives[order][np.flatnonzero(np.diff(session[order], prepend=-1))]
            number = np.empty(len(first_s), np.int32)
            number[np.argsort(first_s, kind="stable")] = np.arange(len(first_s), dtype=np.int32)
            session = number[session]
            order = np.lexsort((arrives, session))
        session, arrives = session[order], arrives[order]
        hints = Hints.none() if events is None else events.hints(session, arrives, number)
        return Workload(
            name=path.name,
            session=session,
            arrives_s=arrives - arrives.min(),
            think_s=np.zeros(len(session)),
            new_tokens=view(self.new_tokens, np.int32)[order],
            output_tokens=view(self.output_tokens, np.int32)[order],
            hints=hints,
            notes=notes,
        )


class EventColumns:
    """The hints that applications sent between requests, as columns."""

    def __init__(self) -> None:
        self._session = array("i")
        self._kind = array("b")
        self._at_s = array("d")
        self._turns_before = array("q")  # Turns of the session that were read before this event: 1 or more.

    def add(self, session: int, kind: str, at_s: float, turns_before: int) -> None:
        self._session.append(session)
        self._kind.append(HINTS.index(kind))
        self._at_s.append(at_s)
        self._turns_before.append(turns_before)

    def hints(
        self, session: NDArray[np.int32], arrives_s: NDArray[np.float64], number: NDArray[np.int32] | None = None
    ) -> Hints:
        """The events as hints for turns that are grouped by session. `number` renumbers the sessions of the events.

        An event before a request of the same session becomes a hint before that request. An event after a session's
        last request becomes a hint as long after the answer as it was after the request, because a trace has no end
        times of answers. An event at the time of the next request or later has no lead, and so no effect.
        """
        if not self._session:
            return Hints.none()
        owner = view(self._session, np.int32)
        if number is not None:
            owner = number[owner]
        at = view(self._at_s, np.float64)
        follows = np.searchsorted(session, owner) + view(self._turns_before, np.int64) - 1
        next_turn = np.minimum(follows + 1, len(session) - 1)
        returns = (follows + 1 < len(session)) & (session[next_turn] == owner)
        order = np.lexsort((at, follows))
        return Hints(
            turn=np.where(returns, follows + 1, -follows - 1)[order],
            kind=view(self._kind, np.int8)[order],
            lead_s=np.maximum(np.where(returns, arrives_s[next_turn] - at, at - arrives_s[follows])[order], 0.0),
        )


def view(values: array[Any], dtype: type[np.generic]) -> NDArray[Any]:
    """The array's memory as a NumPy array, without a copy. The array cannot grow while the view exists."""
    return np.frombuffer(values, dtype)
