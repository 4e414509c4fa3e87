"""What a setting may be: the types of its value, and how a field of a section is made."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)

from kvservice_api.address import parse_listen_address, parse_listen_socket

KIB, MIB, GIB = 2**10, 2**20, 2**30
_SIZE_MAX = 2**60
_SIZE_TEXT = re.compile(r"\s*[-+]?[0-9.]+\s*[A-Za-z]*\s*")


def _text_of_address(value: object) -> object:
    if isinstance(value, int):
        raise ValueError(f'{value} is not an address: write host:port in quotes, such as "127.0.0.1:7070"')
    return value


def _checked_address(text: str) -> str:
    if text:
        parse_listen_address(text)
    return text


def _checked_bulk_address(text: str) -> str:
    try:
        return text if text == "off" else _checked_address(text)
    except ValueError as error:
        raise ValueError(f"{error}; `off` means none") from None


def _checked_socket(text: str) -> str:
    return parse_listen_socket(text).path if text not in ("", "off") else text


def _split_paths(value: object) -> object:
    return [part for part in value.split(os.pathsep) if part] if isinstance(value, str) else value


def _sized(value: object, parse: ValidatorFunctionWrapHandler) -> object:
    no_size = ValueError(
        f"{str(value)!r} is not a size: give bytes, or a number with KiB, MiB, GiB, TiB (1024 each) or KB, MB, GB, "
        "TB (1000 each)"
    )
    if isinstance(value, str) and not _SIZE_TEXT.fullmatch(value):
        raise no_size  # pydantic ignores what follows the unit: it would take "1 MB/s" and "4GiB, 8GiB".
    try:
        return parse(value)
    except ValidationError as error:
        kind = error.errors()[0]["type"]
        if kind == "less_than_equal" and error.errors()[0]["ctx"]["le"] == _SIZE_MAX:
            raise ValueError(f"{value} is more than 1 EiB") from None
        if not kind.startswith("byte_size"):
            raise
        raise no_size from None


AddressText = Annotated[str, BeforeValidator(_text_of_address), AfterValidator(_checked_address)]
BulkAddressText = Annotated[str, BeforeValidator(_text_of_address), AfterValidator(_checked_bulk_address)]
SocketText = Annotated[str, AfterValidator(_checked_socket)]
Paths = Annotated[tuple[Path, ...], BeforeValidator(_split_paths)]
Size = Annotated[ByteSize, Field(ge=0, le=_SIZE_MAX), WrapValidator(_sized)]


def setting(default: object, description: str, *, unit: str = "", **limits: Any) -> Any:
    """A field of a section. `description` and `unit` go into docs/configuration.md; `limits` are those of pydantic."""
    return Field(default, description=description, json_schema_extra={"unit": unit}, **limits)


class Section(BaseModel):
    """The settings of one subject. Its docstring is the introduction to them in docs/configuration.md."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, hide_input_in_errors=True)
