"""One LMDB environment, and the thread that commits to it.

Changes are submitted from the event loop and wait in a queue. The committer takes all queued
changes, makes the blocks' bytes durable (``before_commit``), commits once, and wakes all waiters::

    put, delete --> queue --> before_commit --> merge by key --> one transaction --> wake

A put whose bytes could not be made durable fails alone. If the transaction of a batch fails, its puts fail; the
committer then retries its deletes without them. A tenth of the map is reserved for deletes: LMDB copies each changed
page, so even a delete needs space.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import struct
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import lmdb
import numpy as np

from kvservice.index import pages
from kvservice.index.errors import StoreDamaged
from kvservice_api.errors import IndexFull, StorageFailed

META = b"meta"
LAYOUTS = b"layouts"
BLOCKS = b"blocks"
SESSIONS = b"sessions"
DATA_NAME = "data.mdb"  # LMDB's file name in the environment's folder.
_DATABASES = (META, LAYOUTS, BLOCKS, SESSIONS)

_BATCH_KEYS_MIN, _BATCH_KEYS_MAX = 16, 4096
_READ_CHUNK = 8192
_PAGE_BYTES = os.sysconf("SC_PAGESIZE")
_FREE_BYTES_FEW = 1 << 20
# One delete writes about five new pages (a leaf, its branches, those of the list of free pages), and what it frees
# is free for the transaction after the next: three deletes must fit at the same time, with a margin.
_DELETE_PAGES_MIN = 32

_NOTE = struct.Struct("<Q")  # The number of the last transaction.
_ORDER = np.dtype(">u8")  # The first bytes of a key, as a number in LMDB's order.

Encode = Callable[[], Sequence[bytes]]
Confirm = Callable[[Exception | None], None]  # See `Environment.put`.


@dataclass(slots=True, eq=False)
class _Change:
    database: bytes
    keys: Sequence[bytes]
    encode: Encode | None  # Makes the values, on the committer thread. None deletes.
    confirm: Confirm | None  # Of a put that names bytes in a tier.
    done: asyncio.Future[None]


@dataclass(slots=True)
class _Items:
    """The merged changes of a batch in one database. Deletes are applied first: a key may be in both."""

    puts: dict[bytes, bytes] = field(default_factory=dict)
    deletes: set[bytes] = field(default_factory=set)


_Merged = dict[bytes, _Items]


class Environment:
    """An open environment. Call all methods from the event loop's thread.

    `durable` commits are synced to the disk. Others survive the process, not the machine: right for
    an index on a tmpfs. `before_commit` makes bytes durable. It is called on the committer thread, before a commit
    that holds puts which name some; what it raises is given to their `confirm`. With `has_sessions`, blocks leave a
    tenth of the map to sessions and layouts.

    Every page in use is checked before LMDB maps the file, see `pages`: LMDB itself ends the process on some
    damage. Raises StoreDamaged if the file is not LMDB's or its pages are damaged, StorageFailed if it cannot be
    read or made.
    """

    def __init__(
        self,
        path: Path,
        *,
        map_bytes: int,
        durable: bool,
        before_commit: Callable[[], None] | None = None,
        has_sessions: bool = False,
    ) -> None:
        self.path = path
        self._has_sessions = has_sessions
        self.map_bytes = map_bytes // _PAGE_BYTES * _PAGE_BYTES
        self.used_bytes = 0  # Pages in use, as of the last commit.
        self.commits = 0
        self._durable = durable
        self._before_commit = before_commit
        self._notes_fd: int | None = None
        self._queue: queue.SimpleQueue[_Change | None] = queue.SimpleQueue()
        self._batch_keys_max = _BATCH_KEYS_MIN
        self._env_lock = threading.Lock()  # LMDB's own locks are off: they do not work between containers.
        self._env: lmdb.Environment | None = None
        self._open(create=True)
        with _as_store_errors(path):
            self._allocate()
            self._file_id = self._find_file()
        self._committer = threading.Thread(target=self._run, name=f"kvservice-commit-{path.parent.name}", daemon=True)
        self._committer.start()

    def keep_notes(self, path: Path) -> None:
        """Note in a file outside of the environment which transaction was the last, from now on.

        So an older copy of the folder is recognized: `is_older_copy`. Call it while nothing else is pending.
        Raises StorageFailed.
        """
        with self._env_lock, _as_store_errors(path):
            assert self._env is not None and self._notes_fd is None
            self._notes_fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            with self._env.begin() as txn:
                self._note(txn.id())

    def put(
        self, database: bytes, keys: Sequence[bytes], encode: Encode, confirm: Confirm | None = None
    ) -> asyncio.Future[None]:
        """Store `encode()`'s values under `keys`. The future is done once committed; errors: IndexFull, StorageFailed.

        Values that name bytes need `confirm`. It is called on the committer thread after `before_commit`, with the
        error of that or None, and raises the error with which this put fails.

        Changes are applied in the order of submission. A put that failed may still have reached the
        disk, and cancelling the future cancels only the wait: delete the keys before the extents that
        they name are reserved again.
        """
        return self._submit(_Change(database, keys, encode, confirm, asyncio.get_running_loop().create_future()))

    def delete(self, database: bytes, keys: Sequence[bytes]) -> asyncio.Future[None]:
        """Remove keys. Done once committed; StorageFailed. A missing key is no error."""
        return self._submit(_Change(database, keys, None, None, asyncio.get_running_loop().create_future()))

    def read(self, database: bytes) -> Iterator[tuple[list[bytes], list[bytes]]]:
        """All keys and values, in chunks. Commits wait until the end: do not await one before."""
        with self._env_lock, _as_store_errors(self.path):
            if self._env is None:
                raise StorageFailed(f"the index {self.path} could not be opened again")
            with self._env.begin(db=self._handles[database]) as txn:
                # Two cursors side by side: a million pairs would be a million tuples for the collector.
                keys, values = txn.cursor().iternext(values=False), txn.cursor().iternext(keys=False)
                while chunk := list(islice(keys, _READ_CHUNK)):
                    yield chunk, list(islice(values, _READ_CHUNK))

    def count(self, database: bytes) -> int:
        """How many keys there are."""
        with self._env_lock, _as_store_errors(self.path):
            if self._env is None:
                raise StorageFailed(f"the index {self.path} could not be opened again")
            with self._env.begin() as txn:
                return int(txn.stat(self._handles[database])["entries"])

    def write_now(self, database: bytes, items: dict[bytes, bytes]) -> None:
        """Store items while nothing else is pending: at open, before there is an event loop. Raises IndexFull,
        StorageFailed.
        """
        self._write_in_parts({database: _Items(items)})

    def delete_now(self, database: bytes, keys: Iterable[bytes]) -> None:
        """Remove keys while nothing else is pending. Raises StorageFailed."""
        try:
            self._write_in_parts({database: _Items(deletes=set(keys))})
        except IndexFull as error:
            raise StorageFailed(error.message) from error

    def close(self) -> None:
        """Commit what is pending, then close. Waiters are woken when the loop runs next."""
        self._queue.put(None)
        self._committer.join()
        with self._env_lock:
            if self._env is not None:
                self._env.close()
            self._env = None
        if self._notes_fd is not None:
            os.close(self._notes_fd)
            self._notes_fd = None

    def _submit(self, change: _Change) -> asyncio.Future[None]:
        assert self._committer.is_alive(), "the environment is closed"
        if change.keys:
            self._queue.put(change)
        else:
            change.done.set_result(None)
        return change.done

    # The committer thread

    def _run(self) -> None:
        while batch := self._next_batch():
            self._carry_out(self._confirmed(batch))

    def _next_batch(self) -> list[_Change]:
        """The changes that are pending, at least one. Empty when the environment closes."""
        first = self._queue.get()
        if first is None:
            return []
        batch = [first]
        count = len(first.keys)
        with contextlib.suppress(queue.Empty):
            while count < self._batch_keys_max:
                change = self._queue.get_nowait()
                if change is None:
                    self._queue.put(None)  # Last in the queue: nothing is submitted after close.
                    break
                batch.append(change)
                count += len(change.keys)
        return batch

    def _confirmed(self, batch: list[_Change]) -> list[_Change]:
        """Make the bytes durable that puts name. Returns the batch without those for which that failed."""
        failure: Exception | None = None
        if self._before_commit is not None and any(change.confirm is not None for change in batch):
            try:
                self._before_commit()
            except Exception as error:
                failure = error
        confirmed = []
        for change in batch:
            try:
                if change.confirm is not None:
                    change.confirm(failure)
            except OSError as error:
                _wake([change], StorageFailed(f"a block's bytes could not be made durable: {error}"))
            except Exception as error:
                _wake([change], error)
            else:
                confirmed.append(change)
        return confirmed

    def _carry_out(self, batch: list[_Change]) -> None:
        if not batch:
            return
        failure = self._attempt(batch)
        if failure is None:
            _wake(batch, None)
            return
        deletes = [change for change in batch if change.encode is None]
        of_blocks = [change for change in batch if change.encode is not None and change.database == BLOCKS]
        others = [change for change in batch if change.encode is not None and change.database != BLOCKS]
        if isinstance(failure, IndexFull) and of_blocks and others:  # Blocks alone may be too many.
            _wake(of_blocks, failure)
            self._carry_out([change for change in batch if change.encode is None or change.database != BLOCKS])
            return
        _wake(of_blocks + others, failure)
        if deletes:
            failure = self._attempt(deletes)
            _wake(deletes, StorageFailed(failure.message) if isinstance(failure, IndexFull) else failure)

    def _attempt(self, batch: list[_Change]) -> Exception | None:
        """Commit the batch. Returns the error if that fails: the caller sets it on the futures."""
        try:
            self._write_in_parts(_merge(batch))
        except Exception as error:
            return error
        return None

    def _write_in_parts(self, merged: _Merged) -> None:
        """One transaction; several where its changed pages might not fit beside those they replace."""
        halves = _halves(merged) if _key_count(merged) > self._batch_keys_max else None
        if halves is None:
            try:
                self._write(merged)
                return
            except lmdb.MapFullError:
                halves = _halves(merged)
            if halves is None:
                raise IndexFull(f"the index {self.path} has no space in its map of {self.map_bytes} bytes")
        for half in halves:
            self._write_in_parts(half)

    def _write(self, merged: _Merged) -> None:
        """One transaction. Raises lmdb.MapFullError, IndexFull or StorageFailed."""
        if self._env is None:
            self._reopen()
        assert self._env is not None
        try:
            with self._env_lock, self._env.begin(write=True) as txn:
                used_before = self._used_pages(txn)
                for database, items in merged.items():
                    _apply(txn, self._handles[database], items)
                used_after = self._used_pages(txn)
                has_blocks = BLOCKS in merged and bool(merged[BLOCKS].puts)
                if used_after > max(used_before, self._pages_for_blocks if has_blocks else self._pages_for_records):
                    raise IndexFull(
                        f"the index {self.path} is full: the rest of its {self.map_bytes} bytes is kept for "
                        f"{'sessions and deletes' if has_blocks and self._has_sessions else 'deletes'}"
                    )
        except lmdb.MapFullError:
            raise
        except lmdb.Error as error:
            with contextlib.suppress(StorageFailed):
                self._reopen()  # After a failed write of its meta page, LMDB refuses everything else.
            raise StorageFailed(f"the index {self.path} could not be written: {_why(self.path, error)}") from error
        self._account(used_after)
        self.commits += 1
        self._note(self._env.info()["last_txnid"])  # LMDB does not write a transaction that changed nothing.

    def _account(self, used_pages: int) -> None:
        self.used_bytes = used_pages * _PAGE_BYTES
        # A key changes one or two pages, and LMDB writes a new copy of each. Pages that one transaction
        # frees can be used only by the one after the next. So a batch takes an eighth of the free pages.
        free_pages = self.map_bytes // _PAGE_BYTES - used_pages
        self._batch_keys_max = min(max(free_pages // 8, _BATCH_KEYS_MIN), _BATCH_KEYS_MAX)

    def _note(self, transaction: int) -> None:
        """Runs after the commit. A crash before it leaves an older number, which does not mark the file as old."""
        if self._notes_fd is not None:
            with contextlib.suppress(OSError):
                os.pwrite(self._notes_fd, _NOTE.pack(transaction), 0)

    @property
    def _pages_for_records(self) -> int:
        """How many pages records may take. The others are for deletes, which need pages too."""
        pages = self.map_bytes // _PAGE_BYTES
        return min(pages * 9 // 10, pages - _DELETE_PAGES_MIN)

    @property
    def _pages_for_blocks(self) -> int:
        """How many pages there may be after a put of blocks."""
        pages = self.map_bytes // _PAGE_BYTES
        return self._pages_for_records - (pages // 10 if self._has_sessions else 0)

    def _used_pages(self, txn: lmdb.Transaction) -> int:
        """Pages in use: LMDB itself reports only the highest page that it ever used."""
        used = 2  # The meta pages.
        for handle in (None, *self._handles.values()):
            stat = txn.stat(handle) if handle is not None else txn.stat()
            used += stat["branch_pages"] + stat["leaf_pages"] + stat["overflow_pages"]
        return used

    def _open(self, *, create: bool) -> None:
        with _as_store_errors(self.path), contextlib.ExitStack() as opening:
            if create:
                self.path.mkdir(parents=True, exist_ok=True)
            if why := pages.examine(self.path / DATA_NAME):
                raise StoreDamaged(f"the index {self.path} is damaged: {why}")
            env = opening.enter_context(
                lmdb.open(
                    str(self.path),
                    map_size=self.map_bytes,
                    max_dbs=len(_DATABASES),
                    create=create,
                    lock=False,
                    mode=0o600,
                    readahead=False,
                    sync=self._durable,
                    metasync=self._durable,
                )
            )
            self._handles = {name: env.open_db(name, create=create) for name in _DATABASES}
            with env.begin() as txn:
                self._account(self._used_pages(txn))
            self._env = env
            opening.pop_all()  # It stays open.

    def _reopen(self) -> None:
        """Open the same file again. Raises StorageFailed if it is missing: records in a new file would be lost.

        Where the drive was unmounted, LMDB would make an empty index of its mount point.
        """
        with self._env_lock:
            if self._env is not None:
                self._env.close()
            self._env = None
            try:
                self._expect_same_file()  # Check first, because LMDB creates a missing file.
                self._open(create=False)
            except StoreDamaged as error:  # The callers handle failures of a running index only.
                raise StorageFailed(f"{error}; stop the daemon and run `kvservice check`") from error

    def _expect_same_file(self) -> None:
        with _as_store_errors(self.path):
            if self._find_file() == self._file_id:
                return
        raise StorageFailed(f"the index {self.path} was replaced since the start: restore it, or restart the daemon")

    def _find_file(self) -> tuple[int, int]:
        """The identity of the file, independent of its name."""
        found = (self.path / DATA_NAME).stat()
        return found.st_dev, found.st_ino

    def _allocate(self) -> None:
        """Allocate the whole map, so that deletes succeed when other programs fill the disk.

        Best effort: without it, commits fail with StorageFailed when the disk is full.
        """
        with _opened(self.path / DATA_NAME, os.O_RDWR) as fd:
            if os.fstat(fd).st_blocks * 512 >= self.map_bytes:
                return
            with contextlib.suppress(OSError):
                os.posix_fallocate(fd, 0, self.map_bytes)
        if self._durable:
            for path in (self.path / DATA_NAME, self.path, self.path.parent):  # LMDB syncs no directory.
                with _opened(path, os.O_RDONLY) as fd:
                    os.fsync(fd)


def all_durable(failure: Exception | None) -> None:
    """The `confirm` of a put whose bytes may be anywhere in the tier."""
    if failure is not None:
        raise failure


def is_older_copy(path: Path, notes: Path) -> bool:
    """Whether the environment in `path` lacks a transaction that `notes` has of it. Raises OSError."""
    try:
        noted = notes.read_bytes()[: _NOTE.size]
    except FileNotFoundError:  # An earlier version wrote no such file.
        return False
    last = pages.last_transaction(path / DATA_NAME)
    return len(noted) == _NOTE.size and last is not None and last < _NOTE.unpack(noted)[0]


def _apply(txn: lmdb.Transaction, handle: lmdb._Database, items: _Items) -> None:
    for key in sorted(items.deletes):
        txn.delete(key, db=handle)
    if items.puts:
        txn.cursor(handle).putmulti(_in_key_order(items.puts))


def _in_key_order(puts: dict[bytes, bytes]) -> Iterable[tuple[bytes, bytes]]:
    """The items, ordered by the first bytes of their keys: neighbours share pages, so LMDB takes two thirds of the
    time for a large batch. Any order is right, so keys that begin alike need none.
    """
    keys, packed = list(puts), b"".join(puts)
    key_bytes = len(keys[0])
    if key_bytes < _ORDER.itemsize or len(packed) != key_bytes * len(keys):
        return sorted(puts.items())
    heads = np.frombuffer(packed, np.uint8).reshape(len(keys), key_bytes)[:, : _ORDER.itemsize]
    order = np.ascontiguousarray(heads).view(_ORDER)[:, 0].astype(np.uint64).argsort().tolist()
    values = list(puts.values())
    return zip(map(keys.__getitem__, order), map(values.__getitem__, order), strict=True)


def _merge(batch: Sequence[_Change]) -> _Merged:
    """The last change of each key."""
    merged: _Merged = {}
    for change in batch:
        items = merged.setdefault(change.database, _Items())
        if change.encode is not None:
            items.puts.update(zip(change.keys, change.encode(), strict=True))
        else:
            items.deletes.update(change.keys)
            if items.puts:
                for key in change.keys:
                    items.puts.pop(key, None)
    return merged


def _key_count(merged: _Merged) -> int:
    return sum(len(items.puts) + len(items.deletes) for items in merged.values())


def _halves(merged: _Merged) -> tuple[_Merged, _Merged] | None:
    # In the order of their keys: neighbours share pages, so half of the changes touches half of the pages.
    puts = [(name, key, value) for name, items in merged.items() for key, value in sorted(items.puts.items())]
    deletes = [(name, key) for name, items in merged.items() for key in sorted(items.deletes)]
    middle = (len(puts) + len(deletes)) // 2
    if middle == 0:
        return None
    halves: tuple[_Merged, _Merged] = {}, {}
    for number, (name, key) in enumerate(deletes):  # Deletes first, because they free pages.
        halves[number >= middle].setdefault(name, _Items()).deletes.add(key)
    for number, (name, key, value) in enumerate(puts, len(deletes)):
        halves[number >= middle].setdefault(name, _Items()).puts[key] = value
    return halves


def _wake(changes: Sequence[_Change], failure: Exception | None) -> None:
    """Resolve the futures on their loop's thread, with one call."""
    if not changes:
        return

    def settle() -> None:
        for change in changes:
            if change.done.done():  # Its waiter was cancelled.
                continue
            if failure is None:
                change.done.set_result(None)
            else:
                change.done.set_exception(failure)

    with contextlib.suppress(RuntimeError):  # The loop is closed: no task waits any more.
        changes[0].done.get_loop().call_soon_threadsafe(settle)


@contextlib.contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    fd = os.open(path, flags | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def _why(path: Path, error: Exception) -> str:
    """The error text. LMDB reports a write that a full disk cut short as an input/output error."""
    with contextlib.suppress(OSError):
        stat = os.statvfs(path)
        free_bytes = stat.f_bavail * stat.f_frsize
        if free_bytes < _FREE_BYTES_FEW and "No space left" not in str(error):
            return f"{error} (no space left: the file system has {free_bytes} bytes)"
    return str(error)


@contextlib.contextmanager
def _as_store_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (lmdb.InvalidError, lmdb.CorruptedError, lmdb.PageNotFoundError, lmdb.VersionMismatchError) as error:
        raise StoreDamaged(f"the index {path} is damaged: {error}") from error
    except (FileExistsError, NotADirectoryError) as error:
        raise StorageFailed(f"the index {path} cannot be used: it, or a folder above it, is no folder") from error
    except (lmdb.Error, OSError) as error:
        raise StorageFailed(f"the index {path} cannot be used: {_why(path, error)}") from error
