"""The rule for session ids, for clients and the daemon."""

from __future__ import annotations

import re

from kvservice_api.errors import InvalidRequest

_RULE = "a session id has 1 to 200 letters, digits and -_.:@/+=~, all of them ASCII"
_ID = re.compile(r"[A-Za-z0-9_.:@/+=~-]{1,200}")


def checked_session_id(value: object, field: str = "session_id") -> str:
    """The value, if it is a session id. Raises InvalidRequest, with the rule in its message."""
    if not isinstance(value, str):
        raise InvalidRequest(f"{field} is of type {type(value).__name__}, not text: {_RULE}", field=field)
    if not _ID.fullmatch(value):
        shown = repr(value) if len(value) <= 40 else f"{value[:40]!r}... of {len(value)} characters"
        raise InvalidRequest(f"{field} {shown} is not a session id: {_RULE}", field=field)
    return value
