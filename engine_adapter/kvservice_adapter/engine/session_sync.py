"""Updates a session in the daemon, so that it names the blocks of its conversation."""

from __future__ import annotations

import logging

from kvservice_adapter.engine.prefix_lookup import common_blocks
from kvservice_adapter.session import Conversation, Keys
from kvservice_api.errors import SessionChanged, SessionNotFound
from kvservice_api.keys import BlockChain
from kvservice_client import Client, Layout, SessionState
from kvservice_client.session import Session

log = logging.getLogger(__name__)


def sync_session(client: Client, layout: Layout, session_id: str, chain: BlockChain) -> None:
    """Name stored blocks from the conversation's first token on. A session with other blocks is ended and created
    again.

    A session that was cut is left as it is, because tokens alone do not show what was cut. Waits for the daemon. Raises
    KVError.
    """
    session = client.session(layout, session_id)
    state = _state(session)
    if state is not None and state.cuts:
        log.info("session %s was truncated, and is not changed", session_id)
        return
    _continue(session, state, chain, 0)


def sync_conversation(
    client: Client, layout: Layout, session_id: str, chain: BlockChain, cuts: int, kept_tokens: int
) -> None:
    """Name stored blocks of the tokens since the last of `cuts` cuts, after the `kept_tokens` that the cut has kept.

    A session that was cut in another way is ended and created again, if the conversation has no cut. Waits for the
    daemon. Raises KVError.
    """
    session = client.session(layout, session_id)
    state = _state(session)
    if cuts:
        is_cut_alike = state is not None and state.cuts == cuts and state.token_count >= kept_tokens
        if not is_cut_alike:
            raise SessionChanged("the session was not cut with the conversation: the next turn creates it again")
    elif state is not None and state.cuts:
        session.end()
        state = None
    _continue(session, state, chain, kept_tokens)


def truncate(client: Client, keys: Keys, conversation: Conversation, keep: list[tuple[int, int]]) -> None:
    """Cut the session as the conversation is to be cut. Waits for the daemon.

    Raises KVError; SessionChanged where the session is another conversation's.
    """
    session = client.session(keys.layout, conversation.session_id)
    state = session.get()
    if not conversation.is_of(state, keys) or state.token_count != conversation.token_count:
        raise SessionChanged("the session does not have all of this conversation: it cannot be cut with it")
    session.truncate(keep, state.revision)


def _continue(session: Session, state: SessionState | None, chain: BlockChain, kept_tokens: int) -> None:
    """Name the blocks of a chain that begins after the session's first `kept_tokens`."""
    first_new = 0
    if state is not None:
        since = -(-(state.token_count - kept_tokens) // session.layout.block_tokens)  # Slices since the last cut.
        first_new = since - bool(state.tail_tokens)
        common = common_blocks(chain.keys, state, state.slice_count - since)
        if common == len(chain) == since:
            return  # It names them all.
        next_tokens = chain.token_counts[first_new] if first_new < len(chain) else 0
        goes_on = common >= first_new and chain[first_new:].parent == state.tip
        if not goes_on or next_tokens <= (state.tail_tokens if common == first_new else 0):
            if state.cuts:
                raise SessionChanged("the session has other blocks since its last cut")
            session.end()
            state, first_new = None, 0
    if len(chain) > first_new:
        session.append(chain[first_new:], state.revision if state is not None else 0)


def _state(session: Session) -> SessionState | None:
    try:
        return session.get()
    except SessionNotFound:
        return None
