"""Measures what needs the daemon's own parts: the SSD tier beside its disk, and the index; and loads that begin on SSD.

``python -m benchmarks.daemon DIRECTORY`` reads the name of one measure per line from standard input and answers
each with one JSON object on standard output, or with one that has only `failed`, the reason; ``kvctl bench`` drives it
beside its own measures.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import leftovers
from benchmarks.client import cold
from benchmarks.daemon import index, tier
from benchmarks.report import check_folder


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.daemon", description=__doc__)
    parser.add_argument("directory", type=Path, help="a folder on the disk to measure; what is written is removed")
    parser.add_argument("--quick", action="store_true", help="less data per measure")
    parser.add_argument("--dram-path", type=Path, default=leftovers.SHARED_MEMORY, help="a tmpfs for arenas")
    options = parser.parse_args()
    check_folder(parser, "DIRECTORY", options.directory)
    check_folder(parser, "--dram-path", options.dram_path)
    leftovers.begin(options.directory, options.dram_path)
    size_bytes = (256 if options.quick else 1024) << 20
    runs = 5 if options.quick else 9
    measures: dict[str, Callable[[Path], dict[str, Any]]] = {
        "ssd": lambda directory: tier.measure(directory, options.dram_path, size_bytes),
        "cold": lambda directory: cold.measure(directory, runs=runs, dram_path=options.dram_path),
        "cold bulk": lambda directory: cold.measure(
            directory, transport="bulk", runs=runs, dram_path=options.dram_path
        ),
        "cold grpc": lambda directory: cold.measure(
            directory, transport="grpc", runs=runs, dram_path=options.dram_path
        ),
        "index": lambda _: index.measure(options.dram_path),
    }
    for line in sys.stdin:
        name = line.strip()
        if name not in measures:
            print(
                f"python -m benchmarks.daemon: no measure is called {name!r}; there are {', '.join(measures)}",
                file=sys.stderr,
            )
            return 2
        try:
            with leftovers.own_folder(options.directory) as directory:
                found = measures[name](directory)
        except Exception as error:  # The other measures may work.
            found = {"failed": f"{type(error).__name__}: {error}"}
        print(json.dumps(found), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
