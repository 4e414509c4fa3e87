"""Build the Dockerfile's image with buildah, without a container daemon and without a registry. Needs root.

    python3 -m tools.build_image

The base is a Debian that debootstrap makes, or any image that buildah can pull (`--base`). The folder `dist/image`
gets the image as an archive for ``docker load``, and the list of its software (CycloneDX). The network is used for
packages only: Debian's, and those of PyPI.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tools.image_contents import Image

ROOT = Path(__file__).resolve().parent.parent
MIB = 2**20

_BASE = "localhost/python-base"
_SUITE = "bookworm"
_PACKAGES = ("python-is-python3", "python3", "python3-pip", "python3-venv")
_BUILD_PACKAGES = ("gcc", "libc6-dev", "libpython3-dev")  # In the stage that builds, not in the image.
# Relative to the base's root. debootstrap copies the last two from the host.
_LEFT_OVER = ("var/cache/apt", "var/lib/apt/lists", "var/log", "etc/resolv.conf", "etc/hostname")
# Debian's pip refuses to install beside Debian's packages. The images of python.org have no such file.
_MARKER = "usr/lib/python3*/EXTERNALLY-MANAGED"
# Of the host: how it reaches PyPI. They are mounted while commands of the Dockerfile run, and are not in the image.
_CERTIFICATES = Path("/etc/ssl/certs")
_PIP_SETTINGS = Path("/etc/pip.conf")


class Buildah:
    """buildah with a storage of its own in `storage`, which needs no support of the file system."""

    def __init__(self, storage: Path) -> None:
        self._options = ["--root", str(storage / "root"), "--runroot", str(storage / "run"), "--storage-driver", "vfs"]

    def __call__(self, command: str, *arguments: str) -> str:
        """Returns what it prints. Raises subprocess.CalledProcessError."""
        done = subprocess.run(
            ["buildah", *self._options, command, *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
        )
        return done.stdout.strip()

    def make_base(self, name: str) -> None:
        """A Debian with Python, pip and venv, as the Dockerfile expects them."""
        container = self("from", "--name", "base", "scratch")
        root = Path(self("mount", container))
        command = ["debootstrap", "--variant=minbase", f"--include={','.join(_PACKAGES)}", _SUITE, str(root)]
        subprocess.run(command, stdout=sys.stderr, check=True)
        for path in (*(root / each for each in _LEFT_OVER), *root.glob(_MARKER)):
            if path.is_dir():
                shutil.rmtree(path)
                path.mkdir()
            else:
                path.unlink(missing_ok=True)
        self("config", "--cmd", "python3", container)
        self("commit", "--quiet", "--rm", container, name)

    def build(self, base: str, name: str, *, pull: bool) -> None:
        # A health check is part of Docker's format only.
        arguments = ["--isolation=chroot", "--format=docker", f"--build-arg=PYTHON_IMAGE={base}", f"--tag={name}"]
        arguments.append(f"--pull={'true' if pull else 'never'}")
        if base == _BASE:
            arguments.append(f"--build-arg=BUILD_PACKAGES={' '.join(_BUILD_PACKAGES)}")
        if _CERTIFICATES.exists():
            arguments.append(f"--volume={_CERTIFICATES}:{_CERTIFICATES}:ro")
        if _PIP_SETTINGS.exists():
            arguments.append(f"--secret=id=pip,src={_PIP_SETTINGS}")
        self("build", *arguments, ".")


def build(output: Path, base: str = "") -> tuple[Image, Path]:
    """Returns the image and the file with the list of its software, both in `output`. Raises CalledProcessError."""
    found = re.search(r'^__version__ = "(.+)"$', (ROOT / "kvservice" / "__init__.py").read_text(), re.MULTILINE)
    assert found
    tag = f"kvservice:{found[1]}"
    output.mkdir(parents=True, exist_ok=True)
    archive, software = (output / f"{tag.replace(':', '-')}.{ending}" for ending in ("tar", "cdx.json"))
    archive.unlink(missing_ok=True)  # buildah does not overwrite one.
    with tempfile.TemporaryDirectory(dir=output, prefix="storage-") as storage:
        buildah = Buildah(Path(storage))
        if not base:
            buildah.make_base(_BASE)
        buildah.build(base or _BASE, f"localhost/{tag}", pull=bool(base))
        buildah("push", "--quiet", f"localhost/{tag}", f"docker-archive:{archive}:{tag}")
    image = Image(archive)
    software.write_text(json.dumps(image.software(), indent=1) + "\n")
    return image, software


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--base", default="", help="an image with Python 3.11 to 3.13, instead of a new Debian")
    parser.add_argument("--output", type=Path, default=ROOT / "dist" / "image", help="the folder for both files")
    given = parser.parse_args(argv)
    start_s = time.monotonic()
    image, software = build(given.output.absolute(), given.base)
    own_mib, size_mib = image.layer_bytes[-1] / MIB, sum(image.layer_bytes) / MIB
    print(f"{image.archive}: {size_mib:.0f} MiB, of which KVService and its packages have {own_mib:.0f} MiB")
    print(f"{software}: {len(image.software()['components'])} components")
    print(f"built in {time.monotonic() - start_s:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
