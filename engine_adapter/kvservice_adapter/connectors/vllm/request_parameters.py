"""What a request asks of the connector: the entry `kvservice` of its `kv_transfer_params`, and its session id."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from kvservice_adapter.connectors.vllm.settings import LoadMode
from kvservice_api.errors import InvalidRequest
from kvservice_api.session_ids import checked_session_id

ENTRY = "kvservice"
_NAMES = ("load", "may_load", "may_save", "session_id")


class IgnoredParameter(NamedTuple):
    name: str  # Empty for names that do not exist.
    why: str


class RequestParameters(NamedTuple):
    load: LoadMode
    may_load: bool
    may_save: bool
    session_id: str  # Of the conversation; empty for none.


def parameters_of(request: Any, load: LoadMode) -> tuple[RequestParameters, list[IgnoredParameter]]:
    """A request's parameters, and what of them is wrong and ignored. Never raises: a request must not end the engine.

    `load` is the engine's. An entry's session id precedes vLLM's own, which is the field `session_id` of a request's
    body, or the header `X-Session-ID`.
    """
    ignored: list[IgnoredParameter] = []

    def note(name: str, value: object, must: str) -> None:
        ignored.append(IgnoredParameter(name, f"{name} is {reprlib.repr(value)}; it must be {must}"))

    given = _entry(request.kv_transfer_params, note)
    unknown = [name for name in given if name not in _NAMES]
    if unknown:
        ignored.append(IgnoredParameter("", f"{ENTRY} has no {reprlib.repr(unknown)}; it has {', '.join(_NAMES)}"))
    flags = {"may_load": True, "may_save": True}
    for name in flags.keys() & given.keys():
        if isinstance(given[name], bool):
            flags[name] = given[name]
        else:
            note(name, given[name], "true or false")
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
    return RequestParameters(load, session_id=session_id, **flags), ignored


def _entry(parameters: Any, note: Callable[[str, object, str], None]) -> Mapping[Any, Any]:
    """The connector's entry; an empty one if there is none, or it is not an object."""
    if parameters is not None and not isinstance(parameters, Mapping):
        note("kv_transfer_params", parameters, "an object")
        return {}
    entry = (parameters or {}).get(ENTRY)
    if entry is not None and not isinstance(entry, Mapping):
        note(ENTRY, entry, "an object")
        return {}
    return entry or {}
