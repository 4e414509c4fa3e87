"""Records what a daemon does to its files and indices, and checks the order afterwards.

A mark is a line in a pipe, so it outlives the SIGKILL of its writer::

    <thread> begin write <file> <offset> <size>      bytes of an SSD file; offsets as in extents
    <thread> begin sync <file>                       fdatasync
    <thread> put <key> <file> <offset> <size>        a durable record, in the transaction that is open
    <thread> delete <key>
    <thread> begin commit ssd|dram                   of the durable or the volatile index
    <thread> end | failed                            of what this thread began last
    <thread> aborted                                 the transaction that was open
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import lmdb
import numpy as np

from kvservice.blocks import OBJECT_KEY_BYTES, Extent
from kvservice.index.records import RECORD
from kvservice.tiers.files import FileCalls
from kvservice_api.image import PAGE_BYTES

_SSD_FILE = re.compile(r"ssd-(\d+)\.kv$")


class Marks:
    """Writes lines without mixing them with other threads' lines."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def write(self, *words: object) -> None:
        # Less than PIPE_BUF: the kernel writes it whole, and in the order of the calls.
        os.write(self._fd, " ".join(map(str, (threading.get_ident(), *words, "\n"))).encode())

    def around(self, call: Callable[[], Any], *words: object) -> Any:
        """The result of `call`. Marks its start and its end."""
        self.write("begin", *words)
        try:
            result = call()
        except BaseException:
            self.write("failed")
            raise
        self.write("end")
        return result


class MarkedFileCalls(FileCalls):
    """The real calls, with marks around those that change SSD files."""

    def __init__(self, marks: Marks) -> None:
        self._marks = marks
        self._files: dict[int, int] = {}  # File descriptor -> number of the SSD file.

    def open(self, path: str | os.PathLike[str], flags: int, mode: int = 0o600) -> int:
        fd = super().open(path, flags, mode)
        self._files.pop(fd, None)
        if found := _SSD_FILE.search(os.fspath(path)):
            self._files[fd] = int(found[1])
        return fd

    def pwritev(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        if fd not in self._files or offset < PAGE_BYTES:
            return super().pwritev(fd, buffers, offset)
        words = ("write", self._files[fd], offset - PAGE_BYTES, sum(map(len, buffers)))
        written: int = self._marks.around(lambda: FileCalls.pwritev(self, fd, buffers, offset), *words)
        return written

    def fdatasync(self, fd: int) -> None:
        if fd in self._files:
            self._marks.around(lambda: FileCalls.fdatasync(self, fd), "sync", self._files[fd])
        else:
            super().fdatasync(fd)


class MarkedEnvironment:
    """An LMDB environment with marks in and around its write transactions."""

    def __init__(self, environment: lmdb.Environment, marks: Marks, tier: str) -> None:
        self._environment: Any = environment
        self._marks = marks
        self._tier = tier

    def __getattr__(self, name: str) -> Any:
        return getattr(self._environment, name)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._environment.close()

    def begin(self, *, write: bool = False, **options: Any) -> Any:
        transaction = self._environment.begin(write=write, **options)
        return _MarkedTransaction(transaction, self._marks, self._tier) if write else transaction


class _MarkedTransaction:
    def __init__(self, transaction: lmdb.Transaction, marks: Marks, tier: str) -> None:
        self._transaction = transaction
        self._marks = marks
        self._tier = tier

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transaction, name)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is not None:
            self._transaction.abort()
            self._marks.write("aborted")
            return
        self._marks.around(self._transaction.commit, "commit", self._tier)

    def delete(self, key: bytes, **options: Any) -> bool:
        if self._tier == "ssd":
            self._marks.write("delete", key.hex())
        return bool(self._transaction.delete(key, **options))

    def cursor(self, database: Any) -> _MarkedCursor:
        return _MarkedCursor(self._transaction.cursor(database), self._marks, self._tier)


class _MarkedCursor:
    def __init__(self, cursor: lmdb.Cursor, marks: Marks, tier: str) -> None:
        self._cursor = cursor
        self._marks = marks
        self._tier = tier

    def putmulti(self, items: Iterable[tuple[bytes, bytes]]) -> Any:
        items = list(items)
        for key, value in items:
            if self._tier == "ssd" and len(key) == OBJECT_KEY_BYTES:
                record = np.frombuffer(value, RECORD)[0]
                self._marks.write("put", key.hex(), record["segment"], record["offset_bytes"], record["size_bytes"])
        return self._cursor.putmulti(items)


def marked_open(marks: Marks) -> Callable[..., MarkedEnvironment]:
    """Replaces ``lmdb.open``."""
    real_open = lmdb.open

    def open_marked(path: str, *, sync: bool, **options: Any) -> MarkedEnvironment:
        return MarkedEnvironment(real_open(path, sync=sync, **options), marks, "ssd" if sync else "dram")

    return open_marked


class OrderBroken(AssertionError):
    """A record was committed before its bytes, or bytes were overwritten while a record named them."""


class Replay:
    """Follows the marks of one daemon, and raises OrderBroken at the first mark in a wrong order.

    * A record is committed only after its bytes were written and a later fdatasync of that file ended.
    * Bytes are written only to places that no committed record names, nor one that is being committed.
    """

    _NEVER = np.iinfo(np.int64).max

    def __init__(self, capacities: Sequence[int], records: dict[str, Extent]) -> None:
        """`records` are the records that the daemon found at its start, by object key."""
        self.records = dict(records)
        self.committed_count = 0  # Durable records put by this daemon.
        self.open: dict[str, list[str]] = {}  # Thread -> its running operation.
        self._written_at = [np.full(size // PAGE_BYTES, self._NEVER) for size in capacities]
        self._named = [np.zeros(size // PAGE_BYTES, np.int32) for size in capacities]  # Records that name a page.
        self._synced_before = [-1] * len(capacities)  # Bytes written before this mark are durable.
        self._sync_began: dict[str, int] = {}
        self._puts: dict[str, dict[str, Extent]] = {}
        self._deletes: dict[str, list[str]] = {}
        for extent in records.values():
            self._pages(self._written_at, extent)[:] = -2
            self._pages(self._named, extent)[:] += 1

    def follow(self, lines: Iterable[str]) -> Self:
        for number, line in enumerate(lines):
            thread, what, *words = line.split()
            if what == "begin":
                self.open[thread] = words
                self._begin(number, thread, words)
            elif what in ("end", "failed"):
                begun = self.open.pop(thread)
                if what == "end" or begun[0] == "commit":  # A failed commit may have reached the disk.
                    self._end(number, thread, begun, failed=what == "failed")
            elif what == "aborted":
                self._puts.pop(thread, None)
                self._deletes.pop(thread, None)
            elif what == "put":
                self._puts.setdefault(thread, {})[words[0]] = _extent(words[1:])
            elif what == "delete":
                self._deletes.setdefault(thread, []).append(words[0])
        return self

    @property
    def in_flight(self) -> set[str]:
        """The running operations: some of ``write``, ``sync``, ``commit ssd``, ``commit dram``."""
        return {" ".join(words) if words[0] == "commit" else words[0] for words in self.open.values()}

    def _begin(self, number: int, thread: str, words: list[str]) -> None:
        if words[0] == "write":
            extent = _extent(words[1:])
            if self._pages(self._named, extent).any():
                raise OrderBroken(f"mark {number}: bytes are written where a record points to: {words}")
            self._pages(self._written_at, extent)[:] = self._NEVER
        elif words[0] == "sync":
            self._sync_began[thread] = number
        elif words[1] == "ssd":
            for key, extent in self._puts.get(thread, {}).items():
                if self.records.get(key) == extent:
                    continue  # Only its times change.
                durable = self._pages(self._written_at, extent) < self._synced_before[extent.segment]
                if not durable.all():
                    raise OrderBroken(f"mark {number}: a record is committed before its bytes: {key} {extent}")
                self._pages(self._named, extent)[:] += 1
                self.committed_count += 1

    def _end(self, number: int, thread: str, words: list[str], *, failed: bool) -> None:
        if words[0] == "write":
            self._pages(self._written_at, _extent(words[1:]))[:] = number
        elif words[0] == "sync":
            self._synced_before[int(words[1])] = self._sync_began.pop(thread)
        elif words[1] == "ssd":
            for key, extent in self._puts.pop(thread, {}).items():
                self._drop(key, extent)
                self.records[key] = extent
            for key in self._deletes.pop(thread, []):
                if not failed:
                    self._drop(key, None)
                    self.records.pop(key, None)

    def _drop(self, key: str, replaced_by: Extent | None) -> None:
        extent = self.records.get(key)
        if extent is not None and extent != replaced_by:
            self._pages(self._named, extent)[:] -= 1

    def _pages(self, files: list[Any], extent: Extent) -> Any:
        first = extent.offset_bytes // PAGE_BYTES
        return files[extent.segment][first : first + -(-extent.size_bytes // PAGE_BYTES)]


def read_marks(path: Path) -> Iterator[str]:
    """The lines of a log; the last one may have been cut off by the kill."""
    text = path.read_text()
    return iter(text[: text.rfind("\n") + 1].splitlines())


def _extent(words: Sequence[str]) -> Extent:
    segment, offset, size = map(int, words)
    return Extent(segment, offset, size)
