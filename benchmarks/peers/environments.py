"""A virtual environment for each peer: ``python -m benchmarks.peers.environments [NAME ...]``.

Installs exactly the packages of ``pins/NAME.txt`` into ``.peers/NAME``; an environment that has them is left alone. Two
peers need a package of Debian's. With ``--debian``, as root, these are installed, and Debian starts Redis as a service
on port 6379; without it they are only named.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Sequence
from ctypes.util import find_library
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / ".peers"
_PINS = Path(__file__).with_name("pins")

NAMES = ("redis", "lmcache", "mooncake", "nixl")
_ABOUT = {
    "redis": "redis-py with hiredis (90 MB), and Debian's redis-server",
    "lmcache": "LMCache with torch for CPUs (1.4 GB)",
    "mooncake": "Mooncake Store without CUDA (240 MB), and Debian's libibverbs1",
    "nixl": "NIXL (400 MB)",
}
_DEBIAN = {"redis": "redis-server", "mooncake": "libibverbs1"}


class NotInstalled(Exception):
    """An environment is missing or has other packages. The message says how to make it."""


def python_of(name: str) -> Path:
    """The interpreter of an environment. Raises NotInstalled."""
    if not _is_installed(name):
        raise NotInstalled(f"not installed: run `python -m benchmarks.peers.environments {name}`")
    return FOLDER / name / "bin" / "python"


def install(name: str, *, with_debian: bool = False) -> None:
    """Make one environment. Raises subprocess.CalledProcessError, or NotInstalled for a Debian package."""
    if _is_installed(name):
        print(f"{name}: is installed in {FOLDER / name}")
    else:
        print(f"{name}: installing {_ABOUT[name]} into {FOLDER / name}", flush=True)
        shutil.rmtree(FOLDER / name, ignore_errors=True)
        venv.create(FOLDER / name, with_pip=True)
        pip = [str(FOLDER / name / "bin" / "python"), "-m", "pip", "install", "--quiet", "--no-compile"]
        # Without dependencies, because the pins name all of them: LMCache would bring CUDA otherwise.
        subprocess.run([*pip, "--disable-pip-version-check", "--no-deps", "-r", str(_PINS / f"{name}.txt")], check=True)
        _stamp(name).write_text(_wanted(name))
    package = _DEBIAN.get(name)
    if package is not None and not _is_here(package):
        apt = ["apt-get", "install", "-y", "--no-install-recommends", package]
        if not with_debian or os.geteuid() or not shutil.which("apt-get"):
            raise NotInstalled(f"{name} also needs {package}: on Debian, as root: --debian, or {' '.join(apt)}")
        print(f"{name}: installing Debian's {package}", flush=True)
        subprocess.run(apt, check=True, stdout=subprocess.DEVNULL)


def _is_here(package: str) -> bool:
    """Whether what this Debian package brings is here already, from there or from elsewhere."""
    if package == "redis-server":
        return bool(shutil.which("redis-server") or shutil.which("valkey-server"))
    return find_library("ibverbs") is not None


def _stamp(name: str) -> Path:
    return FOLDER / name / "installed"


def _wanted(name: str) -> str:
    return hashlib.sha256((_PINS / f"{name}.txt").read_bytes()).hexdigest()


def _is_installed(name: str) -> bool:
    return _stamp(name).exists() and _stamp(name).read_text() == _wanted(name)


def main(arguments: Sequence[str] | None = None) -> int:
    """Install what is named, or all. Exit code 1 if one could not be: the others are there."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers.environments", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}; all of them if none is given")
    packages = ", ".join(_DEBIAN.values())
    parser.add_argument("--debian", action="store_true", help=f"as root, also install Debian's {packages}")
    given = parser.parse_args(arguments)
    names = given.names or list(NAMES)
    if unknown := set(names) - set(NAMES):
        parser.error(f"no environment is called {', '.join(sorted(unknown))}; there are {', '.join(NAMES)}")
    failed = False
    for name in names:
        try:
            install(name, with_debian=given.debian)
        except (NotInstalled, subprocess.CalledProcessError, OSError) as error:
            failed = True
            print(f"{name}: {error}", file=sys.stderr)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
