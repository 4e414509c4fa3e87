"""Shared by all trace readers: numbered lines, the errors that name a line, and checks of numbers."""

from __future__ import annotations

import gzip
import io
import stat
import zlib
from collections.abc import Iterator
from pathlib import Path

#: Limit on the tokens of one request. The longest context windows hold ten million tokens.
TOKENS_MAX = 2**24
#: In seconds since 1970 this is the year 2286. Today's time in milliseconds exceeds it, so a wrong unit is noticed.
TIME_MAX_S = 1e10
_GZIP = b"\x1f\x8b"


class TraceError(ValueError):
    """A trace that is not usable. Correct the file, or cut it before the line.

    Attributes:
        path: The file.
        line: Line number from 1; None if the error concerns the whole file.
        reason: What is wrong.
    """

    def __init__(self, path: Path, line: int | None, reason: str) -> None:
        super().__init__(f"{path}: {reason}" if line is None else f"{path}: line {line}: {reason}")
        self.path = path
        self.line = line
        self.reason = reason


class BadLine(ValueError):
    """An error in the line that is read now. `Lines.refusal` adds the file and the line number."""


class Lines:
    """The lines of a text file that are not blank, without line ends. `number` is the current line's, from 1.

    A file that begins as gzip is unpacked while it is read, independent of its name.
    """

    def __init__(self, path: Path) -> None:
        """Open the file. Raises TraceError if it is not a readable regular file."""
        self.path = path
        self.number = 0
        try:
            if not stat.S_ISREG(path.stat().st_mode):
                raise TraceError(path, None, "is a folder" if path.is_dir() else "is no regular file")
            self._file = io.TextIOWrapper(_unpacked(path), encoding="utf-8-sig")
        except OSError as error:
            raise TraceError(path, None, f"cannot be read: {error.strerror}") from error

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()

    def __iter__(self) -> Iterator[str]:
        """Yield the lines. Raises TraceError if the bytes are not UTF-8, or if reading fails."""
        number = 0
        try:
            for line in self._file:
                number += 1
                if not line.isspace():
                    self.number = number
                    yield line.rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise self._undecodable() from error
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise TraceError(self.path, number or None, f"is no whole gzip file after this: {error}") from error
        except OSError as error:
            raise TraceError(self.path, number, f"cannot be read: {error.strerror}") from error

    def refusal(self, reason: object) -> TraceError:
        """The error for the current line."""
        return TraceError(self.path, self.number, str(reason))

    def _undecodable(self) -> TraceError:
        # The decoder works on chunks and does not know the line: read the file again to find it.
        number = 0
        try:
            with _unpacked(self.path) as file:
                for line in file:
                    number += 1
                    line.decode()
        except UnicodeDecodeError:
            return TraceError(self.path, number, "is not UTF-8 text")
        except (OSError, EOFError, zlib.error):
            return TraceError(self.path, None, "is no whole gzip file, and not UTF-8 text")
        return TraceError(self.path, None, "is not UTF-8 text")


def _unpacked(path: Path) -> gzip.GzipFile | io.BufferedReader:
    with path.open("rb") as file:
        packed = file.read(len(_GZIP)) == _GZIP
    return gzip.open(path) if packed else path.open("rb")


def whole_number(name: str, value: object, most: int) -> int:
    """`value`, if it is an int from 0 to `most`. Raises BadLine."""
    if type(value) is not int:
        _refuse_missing(name, value)
        raise BadLine(f"{name} must be a whole number, not {shown(value)}")
    if value < 0:
        raise BadLine(f"{name} is negative: {shown(value)}")
    if value > most:
        raise BadLine(f"{name} is impossibly large: {shown(value)}, at most {most}")
    return value


def seconds(name: str, value: object, least_s: float, unit_s: float = 1.0) -> float:
    """`value` times `unit_s`, if it is a time that is not before `least_s`. Raises BadLine."""
    if type(value) is not float and type(value) is not int:
        _refuse_missing(name, value)
        raise BadLine(f"{name} must be a number, not {shown(value)}")
    if value < 0:
        raise BadLine(f"{name} is negative: {shown(value)}")
    if not value <= TIME_MAX_S / unit_s:
        raise BadLine(f"{name} is impossibly large: {shown(value)}, at most {TIME_MAX_S / unit_s:.0f}")
    time_s = value * unit_s
    if time_s < least_s:
        raise BadLine(f"{name} goes back: {shown(value)} after {least_s / unit_s:.12g}; lines must ascend in time")
    return time_s


def _refuse_missing(name: str, value: object) -> None:
    if value is None:
        raise BadLine(f"{name} is missing; the line may be of another format")


def shown(value: object) -> str:
    """`value` for an error message, at most 60 characters."""
    text = repr(value) if not isinstance(value, int) or abs(value) < 10**20 else f"{'-' * (value < 0)}10^20 and more"
    return text if len(text) <= 60 else text[:57] + "..."
