"""List the software of an image, from the archive that ``docker save`` or ``tools.build_image`` writes.

    python3 -m tools.image_contents kvservice.tar > kvservice.cdx.json

The list is a software bill of materials (SBOM) in CycloneDX 1.6: the daemon's Python packages, the interpreter, and
the packages of Debian.
"""

from __future__ import annotations

import argparse
import json
import re
import tarfile
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from email.parser import HeaderParser
from pathlib import Path
from typing import Any
from urllib.parse import quote

_METADATA = re.compile(r"opt/kvservice/lib/python[0-9.]+/site-packages/[^/]+\.dist-info/METADATA")
_VENV = "opt/kvservice/pyvenv.cfg"
_DPKG = "var/lib/dpkg/status"
_SYSTEM = "usr/lib/os-release"
_NAMED = (_VENV, _DPKG, _SYSTEM)

Component = dict[str, Any]


class Image:
    """An image in an archive, whose layers are read once, without unpacking them."""

    def __init__(self, archive: Path) -> None:
        self.archive = archive
        self._files: dict[str, bytes] = {}  # Those that name software.
        with tarfile.open(archive) as outer:
            (manifest,) = json.loads(_read(outer, "manifest.json"))
            self.config: dict[str, Any] = json.loads(_read(outer, manifest["Config"]))
            self.name: str = (manifest["RepoTags"] or ["image"])[0]
            self.layers: list[str] = manifest["Layers"]  # Members of the archive, the base's first.
            self.layer_bytes = [self._read_layer(outer, layer) for layer in self.layers]

    def software(self) -> dict[str, Any]:
        """The list in CycloneDX 1.6, as JSON values."""
        components = sorted(self._components(), key=lambda each: each["bom-ref"])
        (own,) = (each for each in components if each["bom-ref"].startswith("pkg:pypi/kvservice@"))
        return {
            "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
            "bomFormat": "CycloneDX",
            "specVersion": "1.6",
            "serialNumber": uuid.uuid4().urn,
            "version": 1,
            "metadata": {
                "timestamp": datetime.now(UTC).isoformat(timespec="seconds"),
                "component": {"type": "container", "bom-ref": self.name}
                | {key: own[key] for key in ("name", "version")},
            },
            "components": components,
            "dependencies": [{"ref": self.name, "dependsOn": [each["bom-ref"] for each in components]}],
        }

    def _read_layer(self, outer: tarfile.TarFile, name: str) -> int:
        """Returns the bytes of its files."""
        size_bytes = 0
        with tarfile.open(fileobj=outer.extractfile(name), mode="r:*") as layer:
            for member in layer:
                path = member.name.removeprefix("./")
                if member.isfile() and (path in _NAMED or _METADATA.fullmatch(path)):
                    self._files[path] = _read(layer, member)
                size_bytes += member.size
        return size_bytes

    def _components(self) -> Iterator[Component]:
        for path, content in self._files.items():
            if _METADATA.fullmatch(path):
                yield _python_package(content.decode(errors="replace"))
        if found := re.search(rb"^version = (\S+)$", self._files[_VENV], re.MULTILINE):
            yield _component("application", "generic", "python", found[1].decode())
        system = re.search(rb"^ID=(\w+)$", self._files.get(_SYSTEM, b""), re.MULTILINE)
        for paragraph in self._files.get(_DPKG, b"").decode(errors="replace").strip().split("\n\n"):
            fields = HeaderParser().parsestr(paragraph)
            if system and fields["Status"] == "install ok installed":
                kind = f"deb/{system[1].decode()}"
                yield _component("library", kind, fields["Package"], fields["Version"], arch=fields["Architecture"])


def _python_package(metadata: str) -> Component:
    fields = HeaderParser().parsestr(metadata)
    name = re.sub(r"[-_.]+", "-", fields["Name"]).lower()
    licence = fields["License-Expression"]
    more = {"licenses": [{"expression": licence}]} if licence else {}
    return _component("library", "pypi", name, fields["Version"]) | more


def _component(kind: str, ecosystem: str, name: str, version: str, arch: str = "") -> Component:
    qualifiers = f"?arch={arch}" if arch else ""
    url = f"pkg:{ecosystem}/{quote(name, safe='')}@{quote(version, safe='')}{qualifiers}"
    return {"type": kind, "bom-ref": url, "name": name, "version": version, "purl": url}


def _read(archive: tarfile.TarFile, member: str | tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member)
    assert file is not None
    return file.read()


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(prog="python3 -m tools.image_contents", description=__doc__)
    arguments.add_argument("archive", type=Path)
    print(json.dumps(Image(arguments.parse_args().archive).software(), indent=1))
