"""Builds the optional C extension of `kvservice_api`: the modules beside its C files use it.

Without a C compiler, or with KVS_PURE_PYTHON=1, the wheel has Python code only and is for every platform. The extension
uses Python's limited API, so that one file serves Python 3.11 and later.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

_PARTS = ("copying", "socket_buffers", "file_parts", "tls_contexts")
_NAME = "_copying.abi3.so"


class ExtensionBuildHook(BuildHookInterface[Any]):
    """A wheel gets the extension as one more file. An editable install has it beside its source, in the checkout."""

    _folder: tempfile.TemporaryDirectory[str] | None = None

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if self.target_name == "wheel":
            try:
                why_not = self._build(version, build_data)
            except OSError as error:
                why_not = str(error)
            if why_not:
                self.app.display_warning(f"kvservice is built without its C extension: {why_not}")

    def _build(self, version: str, build_data: dict[str, Any]) -> str:
        """Why the extension could not be built; empty if it was, or is not wanted. Raises OSError."""
        sources = [Path(self.root, "proto/kvservice_api", f"{each}.c") for each in _PARTS]
        beside = sources[0].with_name(_NAME)
        if version == "editable":
            beside.unlink(missing_ok=True)  # It may be of an older source.
        if os.environ.get("KVS_PURE_PYTHON") == "1":
            return ""
        self._folder = tempfile.TemporaryDirectory(prefix="kvservice-build-")
        built = Path(self._folder.name, _NAME)
        if why_not := _compile(sources, built):
            return why_not
        if version == "editable":
            _put(built, beside)
        else:
            platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
            build_data["force_include"][str(built)] = f"kvservice_api/{_NAME}"
            build_data["pure_python"] = False
            build_data["tag"] = f"cp311-abi3-{platform}"
        return ""

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        if self._folder is not None:
            self._folder.cleanup()


def _put(built: Path, place: Path) -> None:
    """In one step: another program may load the file at the same time."""
    new = place.with_name(f"_copying.{os.getpid()}.so")
    try:
        shutil.copy(built, new)
        os.replace(new, place)
    finally:
        new.unlink(missing_ok=True)


def _compile(sources: list[Path], built: Path) -> str:
    """Why it could not be built; empty if it was."""
    if not sys.platform.startswith("linux"):
        return "it is written for Linux"
    compiler = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")
    if shutil.which(compiler[0]) is None:
        compiler = ["cc"]
    headers = sysconfig.get_path("include")
    flags = ("-O3", "-fPIC", "-fvisibility=hidden", "-shared", f"-I{headers}")
    command = [*compiler, *flags, *map(str, sources), "-o", str(built)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"the compiler did not run: {error}"
    return "" if done.returncode == 0 else f"{shlex.join(command)}: {done.stderr.strip()}"
