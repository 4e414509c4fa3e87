"""What a request asks of the connector, and says of its conversation: the entries `kvservice` and `kv_hints` of its
`kv_transfer_params`, and its session id.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from kvservice_adapter.connectors.vllm.settings import LoadMode
from kvservice_api.errors import InvalidRequest
from kvservice_api.session_ids import checked_session_id

ENTRY = "kvservice"
_NAMES = ("load", "may_load", "may_save", "session_id")
HINTS_ENTRY = "kv_hints"
_HINT_FLAGS = ("typing", "session_ended", "do_not_keep")
_HINT_NAMES = ("priority", "tool_call", *_HINT_FLAGS)
_TOOL_NAME_BYTES_MAX = 200  # The daemon refuses longer ones.
_PRIORITY_MAX = 2**30
_EXPECTED_S_MAX = 1e6

_Note = Callable[[str, object, str], None]


class IgnoredParameter(NamedTuple):
    name: str  # Empty for names that do not exist.
    why: str


class ToolCall(NamedTuple):
    name: str
    expected_s: float | None  # How long it usually takes.


class RequestHints(NamedTuple):
    """The application's hints. `priority` is the request's; the others say what will happen after its answer."""

    priority: int = 0  # In the daemon's queue: higher ones first.
    typing: bool = False  # The person already writes the next prompt.
    tool_call: ToolCall | None = None  # The next request has this call's answer.
    session_ended: bool = False  # No request continues the conversation.
    do_not_keep: bool = False  # The same, and nothing of the request is to be saved.


class RequestParameters(NamedTuple):
    load: LoadMode
    may_load: bool
    may_save: bool
    session_id: str  # Of the conversation; empty for none.
    hints: RequestHints = RequestHints()


def parameters_of(request: Any, load: LoadMode) -> tuple[RequestParameters, list[IgnoredParameter]]:
    """A request's parameters, and what of them is wrong and ignored. Never raises: a request must not end the engine.

    `load` is the engine's. An entry's session id precedes vLLM's own, which is the field `session_id` of a request's
    body, or the header `X-Session-ID`.
    """
    ignored: list[IgnoredParameter] = []

    def note(name: str, value: object, must: str) -> None:
        ignored.append(IgnoredParameter(name, f"{name} is {reprlib.repr(value)}; it must be {must}"))

    given, hinted = _entries(request.kv_transfer_params, note)
    for entry, fields, known in ((ENTRY, given, _NAMES), (HINTS_ENTRY, hinted, _HINT_NAMES)):
        if unknown := [name for name in fields if name not in known]:
            ignored.append(IgnoredParameter("", f"{entry} has no {reprlib.repr(unknown)}; it has {', '.join(known)}"))
    flags = {"may_load": True, "may_save": True, **_flags(given, ("may_load", "may_save"), note)}
    if "load" in given:
        if given["load"] in list(LoadMode):
            load = LoadMode(given["load"])
        else:
            note("load", given["load"], f"one of {', '.join(LoadMode)}")
    session_id = given.get("session_id", request.session_id) or ""
    try:
        session_id = session_id and checked_session_id(session_id)
    except InvalidRequest as error:
        ignored.append(IgnoredParameter("session_id", f"{error.message}. The session is not kept"))
        session_id = ""
    return RequestParameters(load, session_id=session_id, hints=_hints(hinted, note), **flags), ignored


def _entries(parameters: Any, note: _Note) -> list[Mapping[Any, Any]]:
    """The connector's entry, and that of hints; an empty one if there is none, or it is not an object."""
    if parameters is not None and not isinstance(parameters, Mapping):
        note("kv_transfer_params", parameters, "an object")
        return [{}, {}]
    entries = []
    for name in (ENTRY, HINTS_ENTRY):
        entry = (parameters or {}).get(name)
        if entry is not None and not isinstance(entry, Mapping):
            note(name, entry, "an object")
            entry = None
        entries.append(entry or {})
    return entries


def _flags(given: Mapping[Any, Any], names: tuple[str, ...], note: _Note) -> dict[str, bool]:
    """Those of the names that are given, and are true or false."""
    flags = {}
    for name in names:
        if isinstance(value := given.get(name), bool):
            flags[name] = value
        elif name in given:
            note(name, value, "true or false")
    return flags


def _hints(given: Mapping[Any, Any], note: _Note) -> RequestHints:
    if not given:
        return RequestHints()
    priority, called = given.get("priority", 0), given.get("tool_call")
    if type(priority) is not int or abs(priority) > _PRIORITY_MAX:
        note("priority", priority, f"a whole number from {-_PRIORITY_MAX} to {_PRIORITY_MAX}")
        priority = 0
    call = None if called is None else _tool_call(called)
    if called is not None and call is None:
        note("tool_call", called, "an object with a `name`, and with `expected_s` if its seconds are known")
    return RequestHints(priority, tool_call=call, **_flags(given, _HINT_FLAGS, note))


def _tool_call(given: Any) -> ToolCall | None:
    if not isinstance(given, Mapping) or not {*given} <= {"name", "expected_s"}:
        return None
    name, expected_s = given.get("name"), given.get("expected_s")
    if not isinstance(name, str) or len(name.encode(errors="replace")) > _TOOL_NAME_BYTES_MAX:
        return None
    is_number = isinstance(expected_s, (int, float)) and not isinstance(expected_s, bool)
    if expected_s is not None and not (is_number and 0 <= expected_s <= _EXPECTED_S_MAX):
        return None
    return ToolCall(name.encode(errors="replace").decode(), expected_s)  # JSON may have half of a surrogate pair.
