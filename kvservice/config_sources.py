"""The values of the settings: from flags, environment and TOML file.

Flags go before the environment, the environment before the TOML file, and that before the defaults::

    --server.address 127.0.0.1:7070     KVSERVICE_SERVER__ADDRESS=...     [server]
                                                                          address = "..."

The file is named by ``--config`` or ``KVSERVICE_CONFIG``. A name that is not a setting is refused.
"""

from __future__ import annotations

import argparse
import difflib
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ByteSize, ValidationError

from kvservice.config import ConfigError, Settings
from kvservice.config_values import GIB, KIB, MIB

ENVIRONMENT_PREFIX = "KVSERVICE_"
CONFIG_VARIABLE = "KVSERVICE_CONFIG"

_SHORT_FLAGS = {"server.insecure": ("--insecure",)}

# Kubernetes puts these into every container beside a Service called "kvservice"; they are no settings.
_SERVICE_LINK = re.compile(r"KVSERVICE_(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT(_\d+_[A-Z]+(_\w+)?)?)")


class Setting(NamedTuple):
    """One row of the documentation."""

    name: str
    section: type[BaseModel]
    description: str
    unit: str
    default: Any


def _all_settings() -> dict[str, Setting]:
    found = {}
    for section_name, section_field in Settings.model_fields.items():
        section = section_field.annotation
        assert isinstance(section, type) and issubclass(section, BaseModel)
        for field_name, field in section.model_fields.items():
            name = f"{section_name}.{field_name}"
            extra = field.json_schema_extra
            assert field.description and isinstance(extra, dict), name
            found[name] = Setting(name, section, field.description, str(extra["unit"]), field.default)
    return found


SETTINGS: Mapping[str, Setting] = _all_settings()


def load_settings(argv: Sequence[str], environ: Mapping[str, str], *, prog: str = "kvservice serve") -> Settings:
    """The settings from flags, environment, TOML file and defaults. Raises ConfigError; `--help` exits."""
    return read_settings(argv, environ, prog=prog)[0]


def read_settings(argv: Sequence[str], environ: Mapping[str, str], *, prog: str) -> tuple[Settings, Mapping[str, str]]:
    """As `load_settings`, and by setting where its value comes from: `default`, a file, a variable or a flag."""
    flags = _from_flags(argv, prog)
    file = flags.pop("config", None) or environ.get(CONFIG_VARIABLE)

    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    sources = dict.fromkeys(SETTINGS, "default")
    layers: tuple[tuple[dict[str, Any], str, Callable[[str], str]], ...] = (
        (_from_toml(file) if file else {}, f"in {file}", lambda name: f"{file}"),
        (_from_environment(environ), "in the environment", environment_name),
        (flags, "among the flags", flag_name),
    )
    for layer, origin, source_of in layers:
        values |= layer
        origins |= dict.fromkeys(layer, origin)
        sources |= {name: source_of(name) for name in layer}

    sections: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        section, _, field = name.partition(".")
        sections.setdefault(section, {})[field] = value
    try:
        return Settings.model_validate(sections), sources
    except ValidationError as error:
        raise ConfigError("; ".join(_explained(problem, origins) for problem in error.errors())) from error


def _from_flags(argv: Sequence[str], prog: str) -> dict[str, Any]:
    values, unknown = _flag_parser(prog).parse_known_args(argv)
    if unknown:
        given_name = unknown[0].partition("=")[0]
        if not given_name.startswith("-"):
            raise ConfigError(
                f"{given_name!r} among the flags belongs to no setting; put a value with a space in quotes"
            )
        raise _unknown(given_name, given_name.lstrip("-"), "among the flags", written=flag_name)
    return vars(values)


def _from_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    values = {}
    for variable, value in environ.items():
        if not variable.startswith(ENVIRONMENT_PREFIX) or variable == CONFIG_VARIABLE:
            continue
        if _SERVICE_LINK.fullmatch(variable):
            continue
        name = variable.removeprefix(ENVIRONMENT_PREFIX).lower().replace("__", ".")
        if name not in SETTINGS:
            raise _unknown(variable, name, "in the environment", written=environment_name)
        values[name] = value
    return values


def _from_toml(file: str) -> dict[str, Any]:
    try:
        document = tomllib.loads(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"the configuration file {file} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"the configuration file {file} is not TOML: {error}") from error
    values = {}
    for section, fields in document.items():
        if not isinstance(fields, dict):
            raise _unknown(section, section, f"in {file}")
        for field, value in fields.items():
            name = f"{section}.{field}"
            if name not in SETTINGS:
                raise _unknown(name, name, f"in {file}")
            values[name] = value
    return values


def environment_name(name: str) -> str:
    """The environment variable of a setting: KVSERVICE_SERVER__ADDRESS for server.address."""
    return ENVIRONMENT_PREFIX + name.replace(".", "__").upper()


def flag_name(name: str) -> str:
    return f"--{name}"


def _unknown(given: str, name: str, origin: str, *, written: Callable[[str], str] = str) -> ConfigError:
    nearest = difflib.get_close_matches(name, SETTINGS, n=1, cutoff=0)[0]
    return ConfigError(f"{given} {origin} is no setting; the nearest one is {written(nearest)}")


def _explained(problem: Mapping[str, Any], origins: Mapping[str, str]) -> str:
    name = ".".join(str(part) for part in problem["loc"][:2])
    reason = str(problem["msg"]).removeprefix("Value error, ")
    if inner := ".".join(str(part) for part in problem["loc"][2:]):  # Such as "0.path", in a list of tables.
        reason = f"{inner}: {reason}"
    return f"{name} {origins[name]}: {reason[0].lower()}{reason[1:]}" if name else reason


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise ConfigError(message)


def _flag_parser(prog: str) -> _Parser:
    parser = _Parser(
        prog=prog,
        usage=f"{prog} [--config FILE] [--SECTION.SETTING VALUE ...]",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--config", metavar="FILE", help="TOML file with settings")
    groups: dict[type[BaseModel], Any] = {}
    for setting in SETTINGS.values():
        if setting.section not in groups:
            groups[setting.section] = parser.add_argument_group(setting.name.partition(".")[0], setting.section.__doc__)
        optional: dict[str, Any] = {"nargs": "?", "const": "true"} if isinstance(setting.default, bool) else {}
        groups[setting.section].add_argument(
            flag_name(setting.name),
            *_SHORT_FLAGS.get(setting.name, ()),
            dest=setting.name,
            metavar=(setting.unit or "value").upper().replace(" ", "_"),
            help=f"{setting.description} Default: {default_text(setting)}.".replace("%", "%%"),
            **optional,
        )
    return parser


def default_text(setting: Setting) -> str:
    """A default as a user writes it."""
    default = setting.default
    if isinstance(default, ByteSize):
        for unit, size in (("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
            if default and default % size == 0:
                return f"{default // size} {unit}"
        return str(int(default))
    if isinstance(default, bool):
        return str(default).lower()
    if isinstance(default, float):
        return str(int(default)) if default.is_integer() else f"{default:g}"
    if default in ("", ()):
        return "empty"
    return str(default)
