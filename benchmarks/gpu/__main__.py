"""``python -m benchmarks.gpu``: measures the GPU path on this machine's GPU."""

from __future__ import annotations

import argparse
import importlib
import signal
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.gpu import PARTS
from benchmarks.gpu.machine import described
from benchmarks.gpu.report import Part, page
from benchmarks.gpu.rig import Clock
from benchmarks.report import commit, write_section
from kvservice.tiers.files import file_system_of
from kvservice_api.cuda.runtime import why_unavailable

_SHARES = {"copies": 0.3, "ttft": 0.55, "saving": 0.15}


def main() -> int:
    """Measure, print, and write with `--write`.

    Exit code 1 if something could not be measured; a missed goal is no failure.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all if none is given")
    parser.add_argument(
        "--rehearsal", action="store_true", help="tiny sizes, also without a GPU: its figures mean nothing"
    )
    parser.add_argument("--seconds", type=float, default=400.0, help="after which no round is begun; 400")
    parser.add_argument("--directory", type=Path, help="for the stores, on the disk to measure; else the temporary one")
    parser.add_argument("--commit", default="", help="the commit of this code, where git does not know it")
    parser.add_argument("--write", type=Path, metavar="FILE", help="also write the results into this Markdown file")
    given = parser.parse_args()
    names = given.names or list(PARTS)
    if unknown := set(names) - set(PARTS):
        parser.error(f"no part is called {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    if given.rehearsal and given.write is not None:
        parser.error("a rehearsal has no figures to write")
    if not given.rehearsal and (reason := why_unavailable()):
        print(f"Nothing was measured on a GPU: {reason}.")
        return 0
    if given.write is not None and not given.write.parent.is_dir():
        parser.error(f"--write: there is no folder {given.write.parent}")  # Now, not after the measurements.
    if given.directory is not None:
        if not given.directory.is_dir():
            parser.error(f"--directory: there is no folder {given.directory}")
        tempfile.tempdir = str(given.directory.resolve())
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # Unwind, so that the daemons stop.
    clock, shares = Clock(given.seconds), sum(_SHARES[name] for name in names)
    command = " ".join(["python -m benchmarks.gpu", *given.names, *(["--rehearsal"] if given.rehearsal else [])])
    machine = f"{described()} SSD: {file_system_of(Path(tempfile.gettempdir())) or 'an unknown file system'}."
    parts: list[Part] = []
    for name in names:
        began_s = time.monotonic()
        module = importlib.import_module(f"benchmarks.gpu.{name}")
        part = Part(module.TITLE, module.ABOUT, module.COLUMNS)
        parts.append(part)
        try:
            with part.attempt("the rest"):
                module.measure(part, clock.share(shares / _SHARES[name]), rehearsal=given.rehearsal)
        finally:  # What an interrupt or a limit ends is kept so far.
            markdown = page(parts, machine, given.commit or commit(), command)
            if given.write is not None:
                write_section(given.write, "gpu bench", markdown)
        shares -= _SHARES[name]
        print(f"{name}: {time.monotonic() - began_s:.0f} s.", file=sys.stderr, flush=True)
    print(markdown, flush=True)
    return int(any(part.errors for part in parts))


if __name__ == "__main__":
    sys.exit(main())
