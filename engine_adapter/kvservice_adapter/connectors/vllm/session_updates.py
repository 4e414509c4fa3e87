"""Updates the sessions of conversations once their blocks are stored, beside vLLM's thread.

The scheduler's role does this, because it is the only one that asks for whole blocks: where several ranks store their
shards, a block counts once all of them have stored theirs.
"""

from __future__ import annotations

import logging
import threading
from contextlib import suppress
from dataclasses import dataclass

from kvservice_adapter.breaker import Breaker
from kvservice_adapter.engine.session_sync import sync_session
from kvservice_api.errors import DaemonUnavailable, DeadlineExceeded, SessionChanged
from kvservice_api.keys import BlockChain
from kvservice_client import BlockCache, Client
from kvservice_client.rate_limited_log import RateLimitedLog

log = logging.getLogger(__name__)

_WAITING_MAX = 1024
_NAMED_MAX = 16_384  # As many sessions as a daemon has by default.
_PATIENCE_S = 30.0  # For the blocks of a turn, which workers store in the background, and for the daemon.
_PAUSE_MIN_S, _PAUSE_MAX_S = 0.02, 1.0
_END_DELAY_S = 1.0  # Until a session is ended: hints about its blocks, which it names, are sent before.
_TRY_AGAIN = (DaemonUnavailable, DeadlineExceeded, SessionChanged)


@dataclass(slots=True)
class _Turn:
    chain: BlockChain | None  # The conversation, from its first token on; None if it is over.
    ended_s: float
    pause_s: float = _PAUSE_MIN_S
    next_s: float = 0.0


class SessionUpdates:
    """Thread-safe. A thread, which starts with the first turn, calls the daemon; no method waits for it."""

    def __init__(self, client: Client, blocks: BlockCache, breaker: Breaker) -> None:
        self._client, self._blocks, self._breaker = client, blocks, breaker
        self._clock = client.clock
        self._lines = RateLimitedLog(log)
        self._changed = threading.Condition()
        self._turns: dict[str, _Turn] = {}  # By session: its last turn, until the session names it.
        self._named: dict[str, None] = {}  # The sessions that name a conversation, the last one last.
        self._has_news = False
        self._is_closed = False
        self._thread: threading.Thread | None = None

    def turn_ended(self, session_id: str, chain: BlockChain) -> None:
        """Let the session name these blocks, once all of them are stored. Until then it stays as it is."""
        self._add(session_id, _Turn(chain, self._clock.now_s()))

    def ended(self, session_id: str) -> None:
        """Delete the session."""
        now_s = self._clock.now_s()
        self._add(session_id, _Turn(None, now_s, next_s=now_s + _END_DELAY_S))

    def _add(self, session_id: str, turn: _Turn) -> None:
        with self._changed:
            self._turns.pop(session_id, None)
            if len(self._turns) == _WAITING_MAX:
                self._end(next(iter(self._turns)), "too many sessions wait for their blocks")
            self._turns[session_id] = turn
            self._has_news = True
            self._changed.notify_all()
            if self._thread is None:
                thread = threading.Thread(target=self._run, name="kvservice-sessions", daemon=True)
                with suppress(RuntimeError):  # The process has too many threads: the next turn tries again.
                    thread.start()
                    self._thread = thread

    def is_named(self, session_id: str) -> bool:
        """Whether this engine has let the session name blocks, and has not ended it."""
        return session_id in self._named

    def close(self) -> None:
        """End the thread, once its call has ended. Turns that wait are not kept."""
        with self._changed:
            self._is_closed = True
            self._turns.clear()
            self._changed.notify_all()

    def _end(self, session_id: str, why: str) -> None:
        """With the lock."""
        del self._turns[session_id]
        if why:
            self._lines.warning("session %s does not name its last turn: %s", session_id, why)

    # On the thread

    def _run(self) -> None:
        while (due := self._due()) is not None:
            for session_id, turn in due:
                self._try(session_id, turn)

    def _due(self) -> list[tuple[str, _Turn]] | None:
        """The turns whose time has come, once there is one; None after the end."""
        with self._changed:
            while not self._is_closed:
                self._has_news, now_s = False, self._clock.now_s()
                if due := [(name, turn) for name, turn in self._turns.items() if turn.next_s <= now_s]:
                    return due
                pause_s = min((turn.next_s - now_s for turn in self._turns.values()), default=_PATIENCE_S)
                self._clock.wait_for(self._changed, lambda: self._has_news or self._is_closed, pause_s)
        return None

    def _try(self, session_id: str, turn: _Turn) -> None:
        is_last = self._clock.now_s() - turn.ended_s > _PATIENCE_S
        try:
            why = self._update(session_id, turn.chain)
        except _TRY_AGAIN as error:
            why = f"{error.reason}: {error.message}"
        except Exception as error:  # The thread must not end: other sessions wait for it.
            why, is_last = f"{type(error).__name__}: {error}", True
        if why and not is_last:
            turn.next_s = self._clock.now_s() + turn.pause_s
            turn.pause_s = min(2 * turn.pause_s, _PAUSE_MAX_S)
            return
        with self._changed:
            if self._turns.get(session_id) is turn:  # Else a later turn has taken its place.
                self._end(session_id, why)

    def _update(self, session_id: str, chain: BlockChain | None) -> str:
        """Why the session cannot name these blocks yet; empty once it does. Raises KVError."""
        if not self._breaker.allow():
            return "the daemon does not answer"
        if chain is None:
            self._named.pop(session_id, None)
            self._client.session(self._blocks.layout, session_id).end()
            return ""
        stored = self._blocks.contains(chain)
        if stored < len(chain):
            return f"only {stored} of its {len(chain)} blocks are stored"
        sync_session(self._client, self._blocks.layout, session_id, chain)
        self._named.pop(session_id, None)
        self._named[session_id] = None
        if len(self._named) > _NAMED_MAX:
            del self._named[next(iter(self._named))]
        return ""
