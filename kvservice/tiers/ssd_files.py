"""The files of an SSD tier on disk: their headers, and how they are created, grown, shrunk and found.

Each file begins with a page that names its store, its number, the count of the store's files, and its size without that
page. Blocks name a file by its number, so a file keeps it as long as it exists.

A file is longer than its header says only while its size changes. Growing allocates first and then writes the header;
shrinking writes the header first. So after a crash the header is always right, and the next start continues.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import NamedTuple

from kvservice.durable_files import sync_folder
from kvservice.tiers.base import StoreMismatch
from kvservice.tiers.files import FileCalls
from kvservice_api.image import PAGE_BYTES

#  | "KVSSD001" | store id 16 | file number u32 | file count u32 | size u64 |     little-endian
_HEADER = struct.Struct("<8s16sIIQ")
_MAGIC = b"KVSSD001"
assert _HEADER.size == 40


class FileHeader(NamedTuple):
    """The identity of an SSD file: file `number` of the `file_count` files of a store, for `size_bytes` of extents."""

    store_id: bytes
    number: int
    file_count: int
    size_bytes: int


def is_missing(path: Path) -> bool:
    """Whether the file does not exist. Raises OSError if that cannot be determined."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return True
    return False


def read_header(path: Path) -> FileHeader | None:
    """None if it is not an SSD file of this version. Raises OSError."""
    with path.open("rb") as file:
        data = file.read(_HEADER.size)
    if len(data) < _HEADER.size or not data.startswith(_MAGIC):
        return None
    return FileHeader(*_HEADER.unpack(data)[1:])


def expect_file(path: Path, store_id: bytes, number: int) -> FileHeader:
    """The header of the store's file of that number. Raises StoreMismatch if the file is not that one, or is cut off;
    OSError.
    """
    found = read_header(path)
    if found is None:
        raise StoreMismatch(f"{path} is no SSD file of this version: move it away, or name another folder")
    if found.store_id != store_id:
        raise StoreMismatch(f"{path} belongs to another store: name that store, or another folder for its files")
    if found.number != number:
        raise StoreMismatch(
            f"{path} is the store's SSD file {found.number}, and file {number} is expected there: it was moved, or "
            "another file took its number. Restore its place, or move it away"
        )
    size = path.stat().st_size
    if size < PAGE_BYTES + found.size_bytes:
        raise StoreMismatch(
            f"{path} has {size} bytes, and its header says {PAGE_BYTES + found.size_bytes}: it was cut off. Restore "
            "it, or drop its blocks: move it away and run `kvservice check --repair`"
        )
    return found


def create(path: Path, header: FileHeader, calls: FileCalls) -> None:
    """Allocate the file completely or not at all: it has another name until all its blocks are allocated.

    Raises OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_of(path)
    fd = calls.open(partial, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    try:
        os.pwrite(fd, _encode(header), 0)  # First: `remove_partial_files` finds out by it whose file it is.
        calls.posix_fallocate(fd, 0, PAGE_BYTES + header.size_bytes)
        calls.fdatasync(fd)
        partial.rename(path)
        sync_folder(path.parent)
    except OSError as error:
        partial.unlink(missing_ok=True)
        text = f"{error.strerror}: an SSD file of {PAGE_BYTES + header.size_bytes} bytes cannot be made"
        raise OSError(error.errno, text, str(path)) from error
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    finally:
        os.close(fd)


def resize(path: Path, header: FileHeader, calls: FileCalls) -> None:
    """Give the file this header and the size in it. No block may be beyond that size. Raises OSError."""
    found = read_header(path)
    assert found is not None, "it was opened"
    size = PAGE_BYTES + header.size_bytes
    if header == found and path.stat().st_size == size:
        return
    fd = calls.open(path, os.O_RDWR)
    try:
        if header.size_bytes > found.size_bytes:
            try:
                calls.posix_fallocate(fd, 0, size)
                calls.fdatasync(fd)
            except OSError as error:
                os.ftruncate(fd, PAGE_BYTES + found.size_bytes)
                text = (
                    f"{error.strerror}: the SSD file cannot grow from {found.size_bytes} to {header.size_bytes} bytes"
                )
                raise OSError(error.errno, text, str(path)) from error
        if header != found:
            os.pwrite(fd, _encode(header), 0)
            calls.fdatasync(fd)
        if os.fstat(fd).st_size > size:
            os.ftruncate(fd, size)
    finally:
        os.close(fd)


def delete(path: Path) -> None:
    """Delete a file that has no block any more, durably. Raises OSError."""
    path.unlink(missing_ok=True)
    sync_folder(path.parent)


def partial_of(path: Path) -> Path:
    """The name of a file that is being created."""
    return path.with_name(path.name + ".partial")


def remove_partial_files(folder: Path, store_id: bytes) -> None:
    """Remove the files that killed starts of this store have left. Raises OSError."""
    for path in folder.glob(partial_of(folder / "ssd-*.kv").name):
        header = read_header(path)
        if header is not None and header.store_id == store_id and path == partial_of(folder / file_name(header.number)):
            path.unlink(missing_ok=True)


def file_name(number: int) -> str:
    return f"ssd-{number:03}.kv"


def files_in(folder: Path, store_id: bytes) -> dict[int, Path]:
    """The store's SSD files in this folder, by number. Raises OSError."""
    found = {path: read_header(path) for path in sorted(folder.glob("ssd-*.kv"))}
    return {header.number: path for path, header in found.items() if header is not None and header.store_id == store_id}


def _encode(header: FileHeader) -> bytes:
    return _HEADER.pack(_MAGIC, *header)
