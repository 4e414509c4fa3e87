"""The files beside the arena that name the clients which may be writing in place, and where.

A client holds an flock on its file as long as it may write; the kernel releases it with the process, also across PID
namespaces. The daemon notes the client's reserved extents in that file. ``kvservice_api/arena.py`` has the format.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from kvservice.blocks import Extent
from kvservice_api.arena import WRITER_HEADER_BYTES, WRITER_NOTE, encode_writer_header, writer_notes
from kvservice_api.errors import NotShared, NoWriterLock
from kvservice_api.image import PAGE_BYTES


class Writer:
    """One client's file. Its notes survive the daemon."""

    def __init__(self, path: Path, fd: int) -> None:
        """Use `open` or `left_behind`."""
        self._path = path
        self._fd = fd
        self._places: dict[Extent, int] = {}  # Extent -> the place of its note in the file.
        self._free: list[int] = []
        self._end = WRITER_HEADER_BYTES

    @classmethod
    def open(cls, directory: Path, client_id: bytes, arena_id: bytes) -> Writer:
        """The file of a client that requests to write.

        Raises NoWriterLock if no client holds its lock, NotShared if there is no space for a note.
        """
        path = directory / client_id.hex()
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError as error:
            raise NoWriterLock(f"{path} cannot be opened: {error.strerror}") from error
        writer = cls(path, fd)
        try:
            writer.check_locked()
            os.ftruncate(fd, 0)
            os.posix_fallocate(fd, 0, PAGE_BYTES)
            os.pwrite(fd, encode_writer_header(arena_id), 0)
        except BaseException as error:
            os.close(fd)
            if isinstance(error, OSError):
                raise NotShared(f"{path} has no space for a writer's notes: {error.strerror}") from error
            raise
        return writer

    @classmethod
    def left_behind(cls, directory: Path, arena_id: bytes) -> Iterator[Writer]:
        """The files of an earlier daemon's clients that may still be writing, with their notes."""
        for path in sorted(filter(Path.is_file, directory.iterdir())) if directory.exists() else ():
            writer = cls(path, os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW))
            if writer.remove_if_unlocked():
                continue
            data = os.pread(writer._fd, os.fstat(writer._fd).st_size, 0)
            for place, offset, size in writer_notes(data, arena_id):
                writer._places[Extent(0, offset, size)] = place
            yield writer

    def check_locked(self) -> None:
        """Raises NoWriterLock if no process holds the client's lock any more."""
        if self._lock():
            fcntl.flock(self._fd, fcntl.LOCK_UN)
            raise NoWriterLock(f"no client holds the lock of {self._path}")

    def note(self, extent: Extent) -> None:
        """Note an extent that the client may write from now on. Raises NotShared if there is no space for the note."""
        place = self._free[-1] if self._free else self._end
        try:
            os.pwrite(self._fd, WRITER_NOTE.pack(extent.offset_bytes, extent.size_bytes), place)
        except OSError as error:
            raise NotShared(f"{self._path} has no space for a writer's notes: {error.strerror}") from error
        if self._free:
            self._free.pop()
        else:
            self._end += WRITER_NOTE.size
        self._places[extent] = place

    def forget(self, extent: Extent) -> None:
        """Delete the note of an extent that the client does not write any more."""
        place = self._places.pop(extent, None)
        if place is not None:
            os.pwrite(self._fd, WRITER_NOTE.pack(0, 0), place)
            self._free.append(place)

    @property
    def extents(self) -> list[Extent]:
        """The extents that the client may be writing."""
        return list(self._places)

    def remove_if_unlocked(self) -> bool:
        """Whether the client has released its lock. Then the file is deleted too, and the noted extents are free."""
        if not self._lock():
            return False
        self._path.unlink(missing_ok=True)
        self.close()
        return True

    def close(self) -> None:
        """Close the file, and keep it for the next daemon."""
        os.close(self._fd)

    def _lock(self) -> bool:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True
