"""``python -m benchmarks.adapter``: measures the adapter with a real model."""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys

# Threads that spin slow down other threads on the same cores, and the daemon. torch reads this at import.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from benchmarks.adapter import MEASUREMENTS
from benchmarks.adapter.report import Section
from benchmarks.report import checked, parser_of
from examples.models import ModelNotFound


def main() -> int:
    """Run the named measurements, print them, and write them with ``--write``.

    Exit codes: 0 if all measurements ran, even if a goal is missed; 1 if the model is not installed.
    """
    parser = parser_of("python -m benchmarks.adapter", __doc__, MEASUREMENTS, "a smaller model and fewer rounds")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    arguments = checked(parser, "measurement", MEASUREMENTS)

    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # Unwind, so that the daemons stop.
    found: dict[str, Section] = {}
    for name in arguments.names:
        print(f"measuring {name}", file=sys.stderr, flush=True)
        try:
            section = importlib.import_module(f"benchmarks.adapter.{name}").measure(quick=arguments.quick)
        except ModelNotFound as error:
            print(f"{name} cannot be measured: {error}", file=sys.stderr)
            return 1
        command = f"python -m benchmarks.adapter {name}{' --quick' if arguments.quick else ''}"
        if arguments.write is not None:
            section.write_into(arguments.write, command)
        if not arguments.json:
            print(section.markdown(command), end="\n\n", flush=True)
        found[name] = section
    if arguments.json:
        print(json.dumps({name: section.as_json() for name, section in found.items()}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
