"""Whether files have changed, for those of TLS: daemon and client read theirs again when they have."""

from __future__ import annotations

import os


def file_stamps(*paths: str | os.PathLike[str]) -> tuple[object, ...]:
    """Differs after each change of a file, in place, by renaming, or by a changed link in its path. Skips empty
    paths."""
    return tuple(_stamp(path) for path in paths if path)


def _stamp(path: str | os.PathLike[str]) -> tuple[int, ...] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
