"""Small real file systems, for tests that fill or break one. Skips the test if mounting is not allowed."""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

_IOC_SHUTDOWN = 0x8004587D  # _IOR('X', 125, u32) of ext4 and xfs.
_WITHOUT_FLUSHING = 2


@contextlib.contextmanager
def tmpfs(path: Path, size_bytes: int) -> Iterator[Path]:
    path.mkdir()
    _mount(["-t", "tmpfs", "-o", f"size={size_bytes}", "tmpfs"], path)
    try:
        yield path
    finally:
        _unmount(path)


class Disk:
    """An ext4 file system in a file, that can be broken as a power cut or a dying controller breaks one."""

    def __init__(self, folder: Path, size_bytes: int) -> None:
        self.path = folder / "disk"
        self._image = folder / "disk.img"
        self.path.mkdir()
        with self._image.open("wb") as file:
            file.truncate(size_bytes)
        try:
            subprocess.run(["mkfs.ext4", "-q", "-m", "0", self._image], check=True, capture_output=True)
        except (FileNotFoundError, subprocess.CalledProcessError) as error:
            pytest.skip(f"no ext4 file system can be made here: {error}")
        self.mount()

    def mount(self, *, read_only: bool = False) -> None:
        _mount(["-o", "loop,ro" if read_only else "loop", str(self._image)], self.path)

    def unmount(self) -> None:
        _unmount(self.path)

    def cut_off(self) -> None:
        """From now on every call fails, and bytes that were not flushed are lost."""
        fd = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.ioctl(fd, _IOC_SHUTDOWN, struct.pack("I", _WITHOUT_FLUSHING))
        except OSError as error:
            pytest.skip(f"the file system cannot be shut down here: {error}")
        finally:
            os.close(fd)


@contextlib.contextmanager
def disk(folder: Path, size_bytes: int) -> Iterator[Disk]:
    made = Disk(folder, size_bytes)
    try:
        yield made
    finally:
        made.unmount()


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """The folder cannot be written meanwhile, as on a drive that the kernel has made read-only."""
    _mount(["--bind", str(folder)], folder)
    try:
        _mount(["-o", "remount,ro,bind"], folder)
        yield
    finally:  # It is on the device of the folder above it, so `Path.is_mount` does not see it.
        subprocess.run(["umount", "-l", folder], check=True)


def fill(path: Path, *, leave_bytes: int = 0) -> Path:
    """Use all free space of a file system except `leave_bytes`. Returns a file; delete it to free the space again."""
    filler = path / "filler"
    stat = os.statvfs(path)
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        if (size := stat.f_bavail * stat.f_frsize - leave_bytes) > 0:
            os.posix_fallocate(file.fileno(), 0, size)
            file.seek(0, os.SEEK_END)
        while not leave_bytes:  # Up to the last block.
            file.write(bytes(4096))
    return filler


def _mount(arguments: Sequence[str], path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("mounting a file system takes root")
    done = subprocess.run(["mount", *arguments, path], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")


def _unmount(path: Path) -> None:
    if path.is_mount() and subprocess.run(["umount", path], capture_output=True, check=False).returncode:
        subprocess.run(["umount", "-l", path], check=True)
