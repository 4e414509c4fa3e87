"""gRPC for this process: the installed package, or in a forked child a copy of it that no fork has touched.

gRPC's threads do not survive a fork, and the client's Attach stream keeps one of them inside gRPC at nearly every
moment. gRPC then leaves its state in the child as it was at the fork ("Other threads are currently calling into
gRPC, skipping fork() handlers"): calls there may wait for ever, on new channels too, and obey no deadline.

So a forked child does not use its parent's gRPC. It loads the extension module once more, from a copy of the file,
which the dynamic linker takes for another library: that has its own state, locks and threads, as in a new process.
The package's Python modules are run once more around it, under another name. This takes some 20 to 100 ms with the
child's first call. The parent's gRPC, and whatever else of the process uses it, are left alone.
"""

from __future__ import annotations

import builtins
import importlib.util
import os
import sys
import threading
from collections.abc import Mapping, Sequence
from importlib.machinery import ExtensionFileLoader, ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType
from typing import Any

import kvservice_api.grpc_forks  # isort: skip  # noqa: F401  # Before whatever else imports gRPC.

import grpc

from kvservice_api.errors import DaemonUnavailable
from kvservice_api.grpc_forks import fork_handlers_off
from kvservice_client import forks

_EXTENSION = "_cython.cygrpc"


class _OwnGrpc:
    """The module of this process. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._module: ModuleType | None = grpc
        self._refusal = ""
        forks.register(self)

    def reset_in_child(self) -> None:
        self._lock = threading.Lock()
        self._module, self._refusal = None, ""

    def get(self) -> Any:
        """Raises DaemonUnavailable where a forked child cannot load a copy. That is tried once per process."""
        with self._lock:
            if self._module is None and not self._refusal:
                try:
                    self._module = _load_copy(f"grpc_after_fork_{forks.generation}")
                except Exception as error:  # Whatever the reason: the caller is told, and recomputes.
                    self._refusal = f"{type(error).__name__}: {error}"
            if self._module is None:
                raise DaemonUnavailable(
                    "this process was forked, and gRPC cannot be loaded for it: "
                    f"{self._refusal}; start the process with the method spawn, or before kvservice_client is imported"
                )
            return self._module


def _load_copy(name: str) -> ModuleType:
    """The package `grpc` once more, by another name, around a new copy of its extension module."""
    file = os.memfd_create("kvservice-grpc", os.MFD_CLOEXEC)
    try:
        _copy(_file_of(sys.modules[f"grpc.{_EXTENSION}"]), file)
        sys.meta_path.insert(0, _CopyFinder(name, f"/proc/self/fd/{file}"))  # It stays: gRPC imports parts late.
        with fork_handlers_off():
            return importlib.import_module(name)
    finally:
        os.close(file)  # The library stays mapped.


class _CopyFinder:
    """Finds the modules of a copy of gRPC: in gRPC's own files, but for the extension module."""

    def __init__(self, name: str, extension: str) -> None:
        self._name = name
        self._extension = extension

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name == self._name:
            loader = _CopyLoader(name, _file_of(grpc), self._name)
            return importlib.util.spec_from_file_location(name, loader=loader, submodule_search_locations=grpc.__path__)
        if not name.startswith(f"{self._name}."):
            return None
        if name == f"{self._name}.{_EXTENSION}":
            loading = ExtensionFileLoader(name, self._extension)
            return importlib.util.spec_from_file_location(name, self._extension, loader=loading)
        found = PathFinder.find_spec(name, path, target)
        if found is not None and isinstance(found.loader, SourceFileLoader):
            found.loader = _CopyLoader(name, found.loader.path, self._name)
        return found


class _CopyLoader(SourceFileLoader):
    """Runs a module of gRPC so that its imports of ``grpc``, also those within functions, lead into the copy."""

    def __init__(self, name: str, path: str, copy: str) -> None:
        super().__init__(name, path)
        self._copy = copy

    def exec_module(self, module: ModuleType) -> None:
        # An import statement calls the __import__ of its module's builtins.
        module.__dict__["__builtins__"] = {**vars(builtins), "__import__": self._import}
        super().exec_module(module)

    def _import(
        self,
        name: str,
        globals: Mapping[str, object] | None = None,  # noqa: A002  # Named as the built-in's.
        locals: Mapping[str, object] | None = None,  # noqa: A002
        fromlist: Sequence[str] | None = (),
        level: int = 0,
    ) -> ModuleType:
        if not level and (name == "grpc" or name.startswith("grpc.")):
            name = self._copy + name.removeprefix("grpc")
        return builtins.__import__(name, globals, locals, fromlist or (), level)


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
