"""Sessions from requests that carry their whole prompt, with the history of the conversation in it."""

from __future__ import annotations

from array import array

from kvservice.simulate.traces.turn_columns import EventColumns, TurnColumns


class WholePrompts:
    """Collects such requests as turns. The new tokens of a turn are those beyond its session's history.

    The history is what the session's item holds: the prompts and the answers before. If a prompt is shorter, because
    the client left a part of an answer out, such as its reasoning, the turn has no new tokens.
    Sessions may be added in any order, the turns of a session in the order of time.
    """

    def __init__(self) -> None:
        self.turns = TurnColumns()
        self.events = EventColumns()
        self._history = array("q")
        self._prompt_tokens = array("i")
        self._turn_count = array("i")

    def begin(self, at_s: float, prompt_tokens: int, answer_tokens: int) -> int:
        """The first request of a new session. Returns the session's number."""
        session = len(self._history)
        self._history.append(0)
        self._prompt_tokens.append(0)
        self._turn_count.append(0)
        self.follow(session, at_s, prompt_tokens, answer_tokens)
        return session

    def follow(self, session: int, at_s: float, prompt_tokens: int, answer_tokens: int) -> None:
        """The next request of a session."""
        new_tokens = max(0, prompt_tokens - self._history[session])
        self.turns.add(session, at_s, new_tokens, answer_tokens)
        self._history[session] += new_tokens + answer_tokens
        self._prompt_tokens[session] = prompt_tokens
        self._turn_count[session] += 1

    def history_tokens(self, session: int) -> int:
        """Tokens of the prompts and the answers of a session so far."""
        return self._history[session]

    def was_cut(self, session: int, prompt_tokens: int) -> bool:
        """Whether a prompt is shorter than half of the session's prompt before it.

        Its history was then cut or summarised: it shares no long prefix with the session.
        """
        return 2 * prompt_tokens < self._prompt_tokens[session]

    def hint(self, session: int, kind: str, at_s: float) -> None:
        """An event after the session's last request so far, at or after its time. `kind` is one of `HINTS`."""
        self.events.add(session, kind, at_s, self._turn_count[session])
