"""How verbs print: tables for people, one JSON document for programs, progress on a terminal."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

from google.protobuf.descriptor import EnumDescriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table

from kvservice_api.interrupts import interruptible
from kvservice_api.v1 import admin_pb2 as pb

_WIDTH = 100_000  # Wider than any row: keys have 64 digits, and a program that reads the output needs whole lines.


def print_json(document: object) -> None:
    print(json.dumps(document, indent=2))


def plain(message: Message) -> dict[str, Any]:
    """A message as JSON types, with all fields: bytes and fixed64 in hexadecimal, times in ISO 8601.

    Absent messages and numbers are None; enum values are their names.
    """
    return {
        field.name: _plain_field(field, getattr(message, field.name))
        if not field.has_presence or message.HasField(field.name)
        else None
        for field in message.DESCRIPTOR.fields
    }


def _plain_field(field: Any, value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(sorted(value.items()))
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return [_plain_value(field, each) for each in value]
    return _plain_value(field, value)


def _plain_value(field: Any, value: Any) -> Any:
    if isinstance(value, Timestamp):
        return moment(value).isoformat(timespec="milliseconds") if value.seconds else None
    if isinstance(value, Message):
        return plain(value)
    if isinstance(value, bytes):
        return value.hex()
    if field.type == FieldDescriptor.TYPE_FIXED64:
        return f"{value:016x}"
    if field.type == FieldDescriptor.TYPE_ENUM:
        return enum_name(field.enum_type, value)
    return value


def enum_name(kind: EnumDescriptor, value: int) -> str:
    """The value's name without its kind's: ``evicted`` for MISS_REASON_EVICTED."""
    zero: str = kind.values_by_number[0].name
    if value not in kind.values_by_number:  # A value of a newer daemon.
        return str(value)
    name: str = kind.values_by_number[value].name
    return name.removeprefix(zero.removesuffix("UNSPECIFIED")).lower()


def moment(timestamp: Timestamp) -> datetime:
    return timestamp.ToDatetime(UTC)


def when(timestamp: Timestamp) -> str:
    """The time by the local wall clock, with its zone."""
    return moment(timestamp).astimezone().strftime("%Y-%m-%d %H:%M:%S %Z")


def age(timestamp: Timestamp) -> str:
    """How long ago, in its largest unit."""
    return _in_its_largest_unit(datetime.now(UTC) - moment(timestamp))


def _in_its_largest_unit(passed: timedelta) -> str:
    for unit, name in ((timedelta(days=1), "d"), (timedelta(hours=1), "h"), (timedelta(minutes=1), "min")):
        if passed >= unit:
            return f"{passed // unit} {name}"
    return f"{max(0, passed // timedelta(seconds=1))} s"


def ahead(timestamp: Timestamp) -> str:
    """In how long, in its largest unit."""
    left = moment(timestamp) - datetime.now(UTC)
    return _in_its_largest_unit(max(left, timedelta(0)))


def size(size_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size_bytes < 1024:
            return f"{size_bytes:.4g} {unit}"
        size_bytes /= 1024
    return f"{size_bytes:.4g} TiB"


def tiers(block: pb.StoredBlock) -> str:
    """The tiers that hold a block. A daemon of an older version sends no names."""
    names = list(block.tiers) or [name for name, held in (("dram", block.in_dram), ("ssd", block.on_ssd)) if held]
    return "+".join(names) or "-"


def tier_statuses(status: pb.StatusResponse) -> dict[str, pb.TierStatus]:
    """The tiers by name, from the fastest to the slowest. A daemon of an older version has two, without names."""
    return {tier.name: tier for tier in status.tiers} or {"dram": status.dram, "ssd": status.ssd}


def table(*columns: str, right: tuple[str, ...] = ()) -> Table:
    made = Table(box=None, pad_edge=False, header_style="bold")
    for name in columns:
        made.add_column(name, justify="right" if name in right else "left", no_wrap=True)
    return made


def console() -> Console:
    """For stdout. It neither cuts nor breaks a line: a terminal breaks those that are longer than it is wide."""
    return Console(highlight=False, width=_WIDTH)


@contextmanager
def progress() -> Iterator[Progress]:
    """On stderr, and only on a terminal. Ctrl-C raises KeyboardInterrupt: the terminal's cursor is hidden meanwhile."""
    with (
        interruptible(),
        Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=Console(stderr=True),
            transient=True,
            disable=not sys.stderr.isatty(),
        ) as shown,
    ):
        yield shown


def show_step(progress: Progress, task: TaskID, completed: int, what: str) -> None:
    """Show what runs now: beside the bar on a terminal, elsewhere as a line on stderr."""
    progress.update(task, completed=completed, description=what)
    if progress.disable:
        print(f"kvctl: {what}", file=sys.stderr, flush=True)
