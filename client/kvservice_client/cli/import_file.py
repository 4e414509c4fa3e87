"""``kvctl import``: store the sessions and blocks of an export file."""

from __future__ import annotations

import errno
import os
import stat
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, BinaryIO

import typer

from kvservice_client.cli import output, transfer
from kvservice_client.cli.options import Address, AsJson, Timeout, connect
from kvservice_client.client import DEFAULT_ADDRESS, Client
from kvservice_client.exports.export_file import ExportReader
from kvservice_client.exports.importer import BlockRefused, Imported, Importer, OtherGeneration

_MIB = 2**20
_CONTINUE = "What came before it is stored; the same command continues."


def import_file(
    file: Annotated[str, typer.Argument(metavar="FILE", help="Of `kvctl export`; - reads standard input.")],
    replace: Annotated[
        bool, typer.Option("--replace", help="Replace sessions that exist here with other content.")
    ] = False,
    any_generation: Annotated[
        bool,
        typer.Option("--any-generation", help="Also store blocks that engines here do not find after a cache reset."),
    ] = False,
    address: Address = DEFAULT_ADDRESS,
    timeout: Timeout = 30.0,
    as_json: AsJson = False,
) -> None:
    """Store the sessions and blocks of a file of `kvctl export`.

    Each record is verified before it is sent, and each block again by the daemon before it is visible. Blocks are on
    SSD when their import is counted, if the daemon has an SSD tier. Blocks that are stored already are not sent, so an
    interrupted import is repeated. Damaged records are left out. Exit code 1 also if one was left out, or if a session
    exists here with other content, is refused, or is not whole.
    """
    run: tuple[Importer, ExportReader] | None = None
    try:
        with connect(address, timeout, transport="grpc") as client, _opened(file) as (stream, size_bytes):
            if size_bytes:
                _warn_if_too_small(client, size_bytes)
            total_mib = None if size_bytes is None else -(-size_bytes // _MIB)
            with transfer.failures(file, _CONTINUE), transfer.progress("importing", total_mib) as show:

                def at(offset: int) -> None:
                    blocks = importer.imported.blocks + importer.imported.already_stored
                    show(-(-offset // _MIB), f"{blocks} blocks, {output.size(offset)}")

                importer = Importer(client, any_generation=any_generation, replace=replace, on_record=at)
                reader = ExportReader(stream, size_bytes, block_bytes_max=importer.block_bytes_max, skips_damaged=True)
                run = importer, reader
                _import(importer, reader)
    except typer.Exit:
        if run is not None:
            _report(run[0].imported, run[1], as_json, is_complete=False)
        raise
    _report(importer.imported, reader, as_json, is_complete=True)
    imported = importer.imported
    if imported.conflicts or imported.refused or imported.incomplete or reader.skipped:
        raise typer.Exit(1)


def _import(importer: Importer, reader: ExportReader) -> None:
    try:
        importer.run(reader)
    except OtherGeneration as error:
        transfer.fail(
            f"{error}: engines here would not find these blocks. Add --any-generation, or give the store the "
            "generations of the other one: docs/operating.md"
        )
    except BlockRefused as error:
        transfer.fail(f"{error}. Make space or a larger tier, or see the daemon's log. {_CONTINUE}")


@contextmanager
def _opened(file: str) -> Iterator[tuple[BinaryIO, int | None]]:
    """The file, and its size if it has one."""
    if file == transfer.STANDARD_STREAM:
        if sys.stdin.isatty():
            raise typer.BadParameter("standard input is a terminal: name a file, or use a pipe")
        yield sys.stdin.buffer, None
        return
    try:
        if os.path.isdir(file):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise typer.BadParameter(f"{file} cannot be read: {error.strerror}") from None
    with os.fdopen(fd, "rb") as stream:
        status = os.fstat(fd)
        yield stream, status.st_size if stat.S_ISREG(status.st_mode) else None


def _warn_if_too_small(client: Client, size_bytes: int) -> None:
    tiers = output.tier_statuses(client.admin.status())
    name, largest = max(tiers.items(), key=lambda tier: tier[1].configured_bytes)
    if size_bytes > largest.configured_bytes:
        here = f"the largest tier here, {name}, {output.size(largest.configured_bytes)}"
        print(f"kvctl: the file has {output.size(size_bytes)}, and {here}: not all of it can stay", file=sys.stderr)


def _report(imported: Imported, reader: ExportReader, as_json: bool, *, is_complete: bool) -> None:
    """`is_complete`: the import has come to the end of the file."""
    damaged = reader.skipped_count - reader.without_layout
    if as_json:
        output.print_json(
            {
                "complete": is_complete,
                "layouts": imported.layouts,
                "sessions": imported.sessions,
                "blocks": imported.blocks,
                "already_stored": imported.already_stored,
                "missing": imported.missing,
                "damaged": damaged,
                "without_layout": reader.without_layout,
                "damaged_at_bytes": [each.offset for each in reader.skipped if not each.lacks_layout],
                "refused": _named(imported.refused),
                "conflicts": _named(imported.conflicts),
                "incomplete": _named(imported.incomplete),
            }
        )
        return
    for each in reader.skipped:
        print(f"kvctl: left out: {each.why}", file=sys.stderr)
    for (fingerprint, session_id), why in imported.refused.items():
        print(f"kvctl: refused: session {session_id!r:.100} of layout {fingerprint.hex()}: {why}", file=sys.stderr)
    for (fingerprint, session_id), why in imported.conflicts.items():
        print(
            f"kvctl: not imported: session {session_id} of layout {fingerprint.hex()}: {why}; --replace replaces it",
            file=sys.stderr,
        )
    for (fingerprint, session_id), why in imported.incomplete.items():
        print(f"kvctl: incomplete: session {session_id} of layout {fingerprint.hex()}: {why}", file=sys.stderr)
    missing = f"; the export lacked {imported.missing} blocks" if imported.missing else ""
    left_out = [
        f"{count} {what}"
        for count, what in (
            (damaged, "damaged"), (reader.without_layout, "without their layout"), (len(imported.refused), "refused")
        )
        if count
    ]  # fmt: skip
    records = f"; records left out: {', '.join(left_out)}" if left_out else ""
    stored = f"{imported.blocks} blocks ({imported.already_stored} were stored already)"
    print(f"imported {imported.sessions} sessions and {stored}{missing}{records}")


def _named(sessions: Mapping[tuple[bytes, str], str]) -> list[dict[str, str]]:
    """One id may name a session of each of several layouts."""
    return [
        {"session": session_id, "layout": fingerprint.hex(), "why": why}
        for (fingerprint, session_id), why in sessions.items()
    ]
