"""gRPC for this process: the installed package, or in a forked child a copy of it that no fork has touched.

gRPC's threads do not survive a fork, and the client's Attach stream keeps one of them inside gRPC at nearly every
moment. gRPC then leaves its state in the child as it was at the fork ("Other threads are currently calling into
gRPC, skipping fork() handlers"): every call there, on new channels too, waits for ever and obeys no deadline.

So a forked child does not use its parent's gRPC. It loads the extension module once more, from a copy of the file,
which the dynamic linker takes for another library: that has its own state, locks and threads, as in a new process.
This takes some 20 to 70 ms with the child's first call. The parent's gRPC, and who else uses it, are left alone.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import threading
from importlib.machinery import ExtensionFileLoader, ModuleSpec
from types import ModuleType
from typing import Any

import grpc

from kvservice_api.errors import DaemonUnavailable
from kvservice_client import forks

_EXTENSION = "grpc._cython.cygrpc"


class _OwnGrpc:
    """The module of this process. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._module: ModuleType | None = grpc
        self._refusal = ""
        forks.register(self)

    def reset_in_child(self) -> None:
        if self._module is not None:
            forks.keep_forever(self._module)
        self._lock = threading.Lock()
        self._module = None

    def get(self) -> Any:
        """Raises DaemonUnavailable where a forked child cannot load a copy. That is tried once per process."""
        with self._lock:
            if self._module is None and not self._refusal:
                try:
                    self._module = _load_copy()
                except Exception as error:  # Whatever the reason: the caller is told, and recomputes.
                    self._refusal = f"{type(error).__name__}: {error}"
            if self._module is None:
                raise DaemonUnavailable(
                    "this process was forked, and gRPC cannot be loaded for it: "
                    f"{self._refusal}; start the process with the method spawn, or before kvservice_client is imported"
                )
            return self._module


def _load_copy() -> ModuleType:
    """The package `grpc` once more, around a new copy of its extension module; `sys.modules` is as before."""
    file = os.memfd_create("kvservice-grpc", os.MFD_CLOEXEC)
    try:
        _copy(_file_of(sys.modules[_EXTENSION]), file)
        finder = _CopyFinder(f"/proc/self/fd/{file}")
        originals = _taken_out()
        sys.meta_path.insert(0, finder)
        try:
            return importlib.import_module("grpc")
        finally:
            sys.meta_path.remove(finder)
            _taken_out()
            sys.modules.update(originals)
    finally:
        os.close(file)  # The library stays mapped.


class _CopyFinder:
    """Finds gRPC's extension module in another file, and leaves all other modules to the finders after it."""

    def __init__(self, path: str) -> None:
        self._path = path

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name != _EXTENSION:
            return None
        return importlib.util.spec_from_file_location(name, self._path, loader=ExtensionFileLoader(name, self._path))


def _taken_out() -> dict[str, ModuleType]:
    """Take all of gRPC's modules out of `sys.modules`, so that the next import runs them again."""
    names = [name for name in sys.modules if name == "grpc" or name.startswith("grpc.")]
    return {name: sys.modules.pop(name) for name in names}


def _file_of(module: ModuleType) -> str:
    if not module.__file__:
        raise OSError(f"{module.__name__} was not loaded from a file")
    return module.__file__


def _copy(path: str, file: int) -> None:
    with open(path, "rb") as source:
        left = os.fstat(source.fileno()).st_size
        while left and (copied := os.sendfile(file, source.fileno(), None, left)):  # From where it stopped before.
            left -= copied
    if left:
        raise OSError(f"{path} was cut while it was copied")


_own = _OwnGrpc()


def own_grpc() -> Any:
    """The module ``grpc`` that this process may use. Raises DaemonUnavailable."""
    return _own.get()
