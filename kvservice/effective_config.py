"""``kvservice config``: prints the settings that a daemon would have, and where each value comes from."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ByteSize

from kvservice import __version__
from kvservice.config import ConfigError
from kvservice.config_sources import SETTINGS, read_settings
from kvservice.config_values import GIB, KIB, MIB

_HELP = """\
usage: kvservice config [--json] [--config FILE] [--SECTION.SETTING VALUE ...]

Prints the settings that `kvservice serve` would have with the same flags and in the same environment, as a TOML file
with each value's source behind it. It checks the values, not the machine. `kvservice serve --help` lists the flags.

options:
  --json  one JSON object: by setting, its value and its source
"""


def main(argv: Sequence[str], environ: Mapping[str, str]) -> int:
    """Exit codes: 0 printed, 2 used wrongly, or a value cannot be used."""
    if {"--help", "-h"} & set(argv):
        print(_HELP, end="")
        return 0
    flags = [each for each in argv if each != "--json"]
    try:
        settings, sources = read_settings(flags, environ, prog="kvservice config")
    except ConfigError as error:
        print(f"kvservice config: {error}", file=sys.stderr)
        return 2
    values = {name: _value(settings, name) for name in SETTINGS}
    if len(flags) < len(argv):
        print(json.dumps({name: {"value": value, "source": sources[name]} for name, value in values.items()}))
    else:
        print(_as_toml(values, sources), end="")
    return 0


def _value(settings: BaseModel, name: str) -> Any:
    section, _, field = name.partition(".")
    return _plain(getattr(getattr(settings, section), field))


def _plain(value: Any) -> Any:
    """The value as JSON has it. Sizes are as a user writes them."""
    if isinstance(value, BaseModel):
        return {name: _plain(getattr(value, name)) for name in type(value).model_fields}
    if isinstance(value, tuple):
        return [_plain(each) for each in value]
    if isinstance(value, ByteSize):
        unit = next(((each, size) for each, size in _UNITS if value and value % size == 0), None)
        return f"{value // unit[1]}{unit[0]}" if unit else int(value)
    return str(value) if isinstance(value, Path) else value


_UNITS = (("GiB", GIB), ("MiB", MIB), ("KiB", KIB))


def _as_toml(values: Mapping[str, Any], sources: Mapping[str, str]) -> str:
    lines = [f"# The settings of kvservice {__version__}."]
    for section, names in groupby(values, key=lambda name: name.partition(".")[0]):
        lines += ["", f"[{section}]"]
        for name in names:
            lines.append(f"{name.partition('.')[2]} = {_toml(values[name])}  # {sources[name]}")
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{name} = {_toml(each)}' for name, each in value.items())}}}"
    return json.dumps(value, ensure_ascii=False)  # Of strings, numbers and truth values TOML is the same.
