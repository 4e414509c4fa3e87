"""Parts of the simulator's verbs: options that check their values, and groups of options."""

from __future__ import annotations

import functools
import inspect
import math
import sys
import typing
from collections.abc import Callable
from dataclasses import is_dataclass
from typing import Any, NoReturn, TypeVar

import typer

from kvservice.simulate.engine import CONTENDERS

NumberT = TypeVar("NumberT", int, float)


def fail(reason: str) -> NoReturn:
    """Print one line to stderr and end with exit code 1."""
    print(f"kvctl: {reason}", file=sys.stderr)
    raise typer.Exit(1)


def number(
    flag: str, text: str, panel: str | None = None, *, least: float = 0.0, most: float = 1e12, above: bool = False,
    below: bool = False, **how: Any,
) -> Any:  # fmt: skip
    """An option for one number from `least` to `most`. `above` and `below` exclude the ends themselves."""

    def check(value: NumberT | None) -> NumberT | None:
        if value is None:
            return None
        low, high = f"{'above' if above else 'at least'} {least:g}", f"{'below' if below else 'at most'} {most:g}"
        if not math.isfinite(value):
            raise typer.BadParameter(f"{value} is not a finite number; it must be {low}")
        if value < least or (above and value == least):
            raise typer.BadParameter(f"{value:g} is too small; it must be {low}")
        if value > most or (below and value == most):
            raise typer.BadParameter(f"{value:g} is too large; it must be {high}")
        return value

    return typer.Option(flag, help=text, rich_help_panel=panel, callback=check, **how)


def policies(text: str) -> list[str]:
    """Names from text such as ``lru,foresight``. Refuses unknown and repeated names."""
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in CONTENDERS:
            known = ", ".join(CONTENDERS)
            raise typer.BadParameter(f"no policy is called {name!r}; choose from {known}", param_hint="--policy")
        if names.count(name) > 1:
            raise typer.BadParameter(f"{name!r} is given more than once", param_hint="--policy")
    return names


def span(text: str, flag: str) -> tuple[float, float]:
    """Two numbers of seconds from text such as ``2:5``."""

    def refuse(reason: str) -> NoReturn:
        raise typer.BadParameter(f"{text!r} {reason}", param_hint=flag)

    first, colon, last = text.partition(":")
    try:
        low, high = float(first), float(last)
    except ValueError:
        colon = ""
    if not colon:
        refuse("is not of the form A:B, such as 2:5")
    if not (math.isfinite(low) and math.isfinite(high)):
        refuse("has an end that is not a finite number")
    if low < 0:
        refuse("begins below 0")
    if low > high:
        refuse("ends before it begins")
    return low, high


def with_options(verb: Callable[..., None]) -> Callable[..., None]:
    """The verb with one option per field of each parameter that is a dataclass, in the parameter's place."""
    parameters = inspect.signature(verb, eval_str=True).parameters.values()
    groups: dict[str, Any] = {each.name: each.annotation for each in parameters if is_dataclass(each.annotation)}

    @functools.wraps(verb)
    def run(**arguments: Any) -> None:
        for name, group in groups.items():
            arguments[name] = group(**{field: arguments.pop(field) for field in group.__dataclass_fields__})
        verb(**arguments)

    shown: list[inspect.Parameter] = []
    for each in parameters:
        shown += _options_of(each.annotation) if each.name in groups else [each.replace(kind=each.KEYWORD_ONLY)]
    # Typer reads a verb's options from `__signature__`, which function types do not declare.
    run.__signature__ = inspect.Signature(shown)  # type: ignore[attr-defined]
    return run


def _options_of(group: Any) -> list[inspect.Parameter]:
    hints = typing.get_type_hints(group, include_extras=True)
    parameters = inspect.signature(group).parameters.values()
    return [each.replace(kind=each.KEYWORD_ONLY, annotation=hints[each.name]) for each in parameters]
