"""``python -m benchmarks.placement``: runs policies in a real daemon, and the simulator beside it."""

from __future__ import annotations

import sys
import time

from benchmarks.placement.experiments import EXPERIMENTS
from benchmarks.report import checked, commit, parser_of


def main() -> int:
    """Run, print and write the named experiments. Exit code 0 if all ran, even if a goal is missed."""
    parser = parser_of("python -m benchmarks.placement", __doc__, EXPERIMENTS, "shorter runs, and one seed")
    arguments = checked(parser, "experiment", list(EXPERIMENTS))
    commit()
    for name in arguments.names:
        print(f"measuring {name}", file=sys.stderr, flush=True)
        began = time.monotonic()
        section = EXPERIMENTS[name](arguments.quick)
        command = f"python -m benchmarks.placement {name}{' --quick' if arguments.quick else ''}"
        markdown = section.markdown(command, time.monotonic() - began)
        print(markdown, end="\n\n", flush=True)
        if arguments.write is not None:
            section.write_into(arguments.write, markdown)
    return 0


if __name__ == "__main__":
    sys.exit(main())
