"""Measures what needs the daemon's own parts: the disk, the SSD tier, and the index.

``python -m benchmarks.daemon DIRECTORY`` reads the name of one measure per line from standard input and answers
each with one JSON object on standard output; ``kvctl bench`` drives it beside its own measures.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.daemon import disk, index, tier


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.daemon", description=__doc__)
    parser.add_argument("directory", type=Path, help="a folder on the disk to measure; what is written is removed")
    parser.add_argument("--quick", action="store_true", help="less data per measure")
    options = parser.parse_args()
    size_bytes = (256 if options.quick else 1024) << 20
    measures: dict[str, Callable[[Path], dict[str, Any]]] = {
        "disk-read": lambda directory: disk.measure(directory, size_bytes, "read"),
        "disk-write": lambda directory: disk.measure(directory, size_bytes, "write"),
        "ssd": lambda directory: tier.measure(directory, size_bytes),
        "index": lambda directory: index.measure(directory),
    }
    for line in sys.stdin:
        name = line.strip()
        if name not in measures:
            print(
                f"python -m benchmarks.daemon: no measure is called {name!r}; there are {', '.join(measures)}",
                file=sys.stderr,
            )
            return 2
        with tempfile.TemporaryDirectory(prefix="kvservice-bench-", dir=options.directory) as directory:
            print(json.dumps(measures[name](Path(directory))), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
