"""``kvctl export``: write sessions and blocks to a file, for another daemon."""

from __future__ import annotations

import fcntl
import os
import stat
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Annotated, BinaryIO, NamedTuple

import typer

from kvservice_api.errors import SessionNotFound, UnknownLayout
from kvservice_api.v1 import admin_pb2, sessions_pb2
from kvservice_client.cli import output, transfer
from kvservice_client.cli.options import (
    Address,
    AsJson,
    Timeout,
    checked_digits,
    connect,
    keys_of,
    layout_of,
)
from kvservice_client.client import DEFAULT_ADDRESS, Client
from kvservice_client.exports.export_file import ExportWriter, ResumedFile
from kvservice_client.exports.exporter import CyclicChain, Exporter


def export(
    file: Annotated[str, typer.Argument(metavar="FILE", help="Is created; - writes to standard output.")],
    sessions: Annotated[
        list[str] | None, typer.Argument(metavar="[SESSION]...", help="Ids of sessions, with all their blocks.")
    ] = None,
    chain: Annotated[
        list[str] | None,
        typer.Option("--chain", metavar="KEY", help="This block and the stored ones that it continues; repeatable."),
    ] = None,
    layout: Annotated[
        str,
        typer.Option(
            "--layout",
            metavar="FINGERPRINT",
            help="All sessions and blocks of this layout; with SESSION, those sessions of this layout only.",
        ),
    ] = "",
    everything: Annotated[bool, typer.Option("--everything", help="All sessions and blocks of all layouts.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Continue FILE after its last whole record.")] = False,
    address: Address = DEFAULT_ADDRESS,
    timeout: Timeout = 30.0,
    as_json: AsJson = False,
) -> None:
    """Write sessions and blocks to a file, which `kvctl import` stores in another daemon.

    Each record has a checksum. The daemon continues to serve; blocks that are evicted before their turn are listed,
    and the exit code is 1. An export that was interrupted continues with --resume. The file contains conversations as
    their KV: it is readable by its owner only, and must be kept as the prompts are kept.

        kvctl export chats.kvx chat-17 chat-18
        kvctl export --everything - | ssh other-host kvctl import -
    """
    if bool(sessions or chain) + everything > 1 or not (sessions or chain or layout or everything):
        raise typer.BadParameter("give sessions, --chain, --layout or --everything")
    if layout and (everything or chain):
        raise typer.BadParameter("--layout goes with sessions or alone")
    is_pipe = file == transfer.STANDARD_STREAM
    if is_pipe and (resume or as_json):
        raise typer.BadParameter("needs a FILE, not -", param_hint="--resume" if resume else "--json")
    if is_pipe and sys.stdout.isatty():
        raise typer.BadParameter("standard output is a terminal: send it to a file or another program")
    keys = [checked_digits(key, "key") for key in chain or ()]
    digits = checked_digits(layout, "layout") if layout else ""
    again = "" if is_pipe else "Continue with --resume."
    with connect(address, timeout, transport="grpc") as client:
        wanted = _wanted(client, sessions or (), keys, digits, everything=everything)
        with _opened(file, resume) as (stream, resumed), transfer.failures(file, again):
            if resumed.is_complete:
                raise typer.BadParameter(f"{file} is complete: there is nothing to continue", param_hint="--resume")
            writer = ExportWriter(stream, resumed.contents)
            with transfer.progress("exporting", wanted.total or None) as show:
                done = 0

                def count() -> None:
                    nonlocal done
                    done += 1
                    show(done, f"{done} blocks, {output.size(writer.bytes_written)}")

                exporter = Exporter(client, writer, count)
                for session in wanted.sessions:
                    exporter.session(session.session_id, session.layout_fingerprint)
                for key in wanted.keys:
                    try:
                        exporter.chain(key)
                    except CyclicChain as error:
                        transfer.fail(f"{error}: such a chain has no beginning. Export the other ones to another file.")
                for each in wanted.layouts:
                    exporter.layout(each.fingerprint)
            exporter.end()
            if not is_pipe:
                os.fsync(stream.fileno())
    _report(file, writer, exporter, resumed, as_json)
    if exporter.missing:
        raise typer.Exit(1)


class _Wanted(NamedTuple):
    sessions: list[sessions_pb2.Session]
    keys: list[bytes]
    layouts: list[admin_pb2.StoredLayout]

    @property
    def total(self) -> int:
        """Blocks, except those of chains. Of a session slices, which are as many or more."""
        return sum(each.slice_count for each in self.sessions) + sum(each.blocks for each in self.layouts)


def _wanted(client: Client, ids: Sequence[str], keys: Sequence[str], digits: str, *, everything: bool) -> _Wanted:
    """What the arguments name. Raises SessionNotFound, BlockNotFound, UnknownLayout, before a file is made."""
    fingerprint = layout_of(client, digits)
    layouts = [each for each in client.admin.list_layouts() if not digits or each.fingerprint == fingerprint]
    if digits and not layouts:
        raise UnknownLayout(f"there is no layout {digits}")
    sessions = []
    for session_id in dict.fromkeys(ids):
        found = list(client.admin.list_sessions(session_id, fingerprint)) if session_id else []
        if not found:
            raise SessionNotFound(f"there is no session {session_id!r}", session_id=session_id)
        sessions += found
    stored = [client.admin.inspect(key).shards[0].key for key in keys_of(client, keys)]
    return _Wanted(sessions, stored, layouts if everything or not (ids or keys) else [])


@contextmanager
def _opened(file: str, resume: bool) -> Iterator[tuple[BinaryIO, ResumedFile]]:
    """The file, positioned at its end, and what it has. Only its owner can read a file that is created."""
    nothing = ResumedFile(None, 0, 0, is_complete=False)
    if file == transfer.STANDARD_STREAM:
        try:
            yield sys.stdout.buffer, nothing
        finally:
            try:
                sys.stdout.buffer.flush()
            except OSError:  # Its reader has ended. Python would try to flush again at its end.
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return
    try:
        fd = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | (0 if resume else os.O_EXCL), 0o600)
        is_file = stat.S_ISREG(os.fstat(fd).st_mode)
    except FileExistsError:
        raise typer.BadParameter(f"{file} exists: name another file, or continue it with --resume") from None
    except OSError as error:
        raise typer.BadParameter(f"{file} cannot be written: {error.strerror}") from None
    stream, resumed = os.fdopen(fd, "r+b" if is_file else "wb"), nothing
    try:
        if is_file:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise typer.BadParameter(f"another kvctl writes {file}") from None
        if resume and is_file:
            with transfer.failures(file, "It was not changed."):
                resumed = ResumedFile.read(stream, os.fstat(fd).st_size)
            if not resumed.is_complete:
                stream.truncate(resumed.offset)
                stream.seek(resumed.offset)
        yield stream, resumed
    finally:
        with suppress(OSError):  # After a failure, such as a full disk, it fails again.
            stream.close()


def _report(file: str, writer: ExportWriter, exporter: Exporter, resumed: ResumedFile, as_json: bool) -> None:
    contents = writer.contents
    size_bytes = resumed.offset + writer.bytes_written
    if as_json:
        output.print_json(
            {
                "file": file,
                "layouts": len(contents.layouts),
                "sessions": len(contents.sessions),
                "blocks": len(contents.blocks),
                "size_bytes": size_bytes,
                "resumed_at_bytes": resumed.offset,
                "missing": [{"key": key.hex(), "session": name} for key, name in exporter.missing.items()],
            }
        )
        return
    for key, session_id in exporter.missing.items():
        print(f"kvctl: missing: block {key.hex()}{f' of session {session_id}' if session_id else ''}", file=sys.stderr)
    what = f"{len(contents.sessions)} sessions and {len(contents.blocks)} blocks, {output.size(size_bytes)}"
    left_out = f"; {len(exporter.missing)} blocks were not stored any more" if exporter.missing else ""
    to_stderr = file == transfer.STANDARD_STREAM
    print(f"exported {what}{left_out}", file=sys.stderr if to_stderr else sys.stdout)
