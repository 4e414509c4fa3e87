"""The page that describes the client's public names: from their signatures and docstrings."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any

import kvservice_client

HEAD = """\
# Python API of the client

<!-- Generated from kvservice_client by `make docs`. -->

`kvservice_client` is what an engine's process imports: NumPy and gRPC, and no torch. All calls are synchronous and
thread-safe unless a text says otherwise; [fork.md](../fork.md) describes processes, threads and asyncio. Every error is
a `KVError` ([errors](../errors.md)). The [README](../../README.md#use-it) and the [examples](../../examples) show the
calls together, and the [glossary](../glossary.md) defines the words.
"""

SUBJECTS = {
    "Connecting": ("Client", "TlsFiles", "Clock", "ArenaObserver", "DEFAULT_ADDRESS"),
    "Layouts and keys": ("Layout", "LayerGroup", "Rotary", "Shard", "block_chain", "BlockChain", "ChainBuilder"),
    "Finding and loading": (
        *("BlockCache", "Lease", "LoadedLayer", "View", "ResidencyRun", "LocalHit", "PendingLookup", "FoundPrefix"),
    ),
    "Saving": ("Durability", "SaveResult", "Reservation"),
    "Sessions": ("Session", "SessionState", "SessionHistory", "Slice"),
    "Hints and reports": ("EngineHints", "QueuedRequest", "Readiness", "ReadyState", "RequestReport", "Outcome"),
    "Operating": ("Admin", "Tier", "PrefetchResult", "EvictResult", "Stats", "TransportStats", "KVError"),
}


def python_page() -> str:
    """Raises ValueError if `SUBJECTS` and the public names differ."""
    named = {name for names in SUBJECTS.values() for name in names}
    if named != set(kvservice_client.__all__):
        raise ValueError(f"not in both SUBJECTS and __all__: {named ^ set(kvservice_client.__all__)}")
    parts = [HEAD]
    for subject, names in SUBJECTS.items():
        parts.append(f"\n## {subject}\n")
        for name in names:
            parts += _described(name, getattr(kvservice_client, name))
    return "".join(parts)


def _described(name: str, value: Any) -> Iterator[str]:
    yield f"\n### {name}\n\n"
    if isinstance(value, str):
        yield f"`{value!r}`\n"
        return
    yield f"{_text(value)}\n"
    if not isinstance(value, type):
        yield f"\n`{name}{_signature(value)}`\n"
        return
    if issubclass(value, Enum):
        yield f"\nValues: {', '.join(f'`{each.name}`' for each in value)}.\n"
        return
    if members := list(_fields(value)):
        yield f"\nFields: {', '.join(f'`{each}`' for each in members)}.\n"
    elif "__init__" in vars(value) and inspect.getdoc(value.__init__) != "Use `open`.":
        yield f"\n`{name}{_signature(value.__init__)}`\n"
        if value.__init__.__doc__:
            yield f"\n{_text(value.__init__)}\n"
    for method, member in vars(value).items():
        if method.startswith("_"):
            continue
        function = member.__func__ if isinstance(member, (classmethod, staticmethod)) else member
        if isinstance(function, property):
            yield f"\n* `{method}`: {_type(function.fget)}{_after(_text(function))}\n"
        elif inspect.isfunction(function):
            yield f"\n* `{method}{_signature(function)}`{_after(_text(function))}\n"


def _fields(kind: type) -> Iterator[str]:
    """The values that an object of this class has, with their types."""
    if is_dataclass(kind):
        yield from (f"{each.name}: {each.type}" for each in fields(kind) if each.repr and not each.name.startswith("_"))
    elif hasattr(kind, "_fields"):
        yield from (f"{each}: {_plain(kind.__annotations__[each])}" for each in kind._fields)


def _signature(function: Any) -> str:
    signature = inspect.signature(function)
    shown = [
        each.replace(default=_Shown(each.default)) if each.default is not each.empty else each
        for each in signature.parameters.values()
        if each.name not in ("self", "cls")
    ]
    return re.sub(r"'([A-Z][\w\[\]., |]*)'", r"\1", _unquoted(str(signature.replace(parameters=shown))))


class _Shown:
    """A default as a reader needs it: objects without a literal are dots."""

    def __init__(self, value: object) -> None:
        self._text = "..." if " at 0x" in repr(value) or " object" in repr(value) else repr(value)

    def __repr__(self) -> str:
        return self._text


def _unquoted(signature: str) -> str:
    """Without the quotes that `str` puts around annotations that are text."""
    return re.sub(r"(: |-> )(['\"])((?:(?!\2)[^\\]|\\.)*)\2", r"\1\3", signature).replace("\\'", "'")


def _type(function: Any) -> str:
    return f"`{_plain(function.__annotations__.get('return', ''))}`."


def _plain(annotation: Any) -> str:
    text = getattr(annotation, "__forward_arg__", None) or getattr(annotation, "__name__", None) or str(annotation)
    return str(text)


def _text(value: Any) -> str:
    return (inspect.getdoc(value) or "").replace("``", "`")


def _after(text: str) -> str:
    """A member's text in its item of the list."""
    return f"\n{_indented(text)}" if text else ""


def _indented(text: str) -> str:
    return "\n".join(f"  {line}".rstrip() for line in text.splitlines())
