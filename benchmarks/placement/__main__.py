"""``python -m benchmarks.placement``: runs policies in a real daemon, and the simulator beside it."""

from __future__ import annotations

import sys
import time

from benchmarks.placement.experiments import EXPERIMENTS, Options
from benchmarks.report import checked, commit, parser_of

_SEEDS = 3
_WITH_SEEDS = {"agreement", "unqueued"}


def main() -> int:
    """Run, print and write the named experiments. Exit code 0 if all ran, even if a goal is missed."""
    parser = parser_of("python -m benchmarks.placement", __doc__, EXPERIMENTS, "shorter runs")
    scale = "all times are longer and all rates lower by this factor: for a slow or busy machine"
    parser.add_argument("--time-scale", type=float, default=1.0, metavar="FACTOR", help=scale)
    parser.add_argument("--seeds", type=int, default=_SEEDS, metavar="NUMBER", help="of `unqueued` and `agreement`")
    arguments = checked(parser, "experiment", list(EXPERIMENTS))
    if arguments.seeds != _SEEDS and not _WITH_SEEDS & set(arguments.names):
        parser.error(f"--seeds is of {' and '.join(sorted(_WITH_SEEDS))}, and neither is named")
    options = Options(arguments.quick, arguments.time_scale, arguments.seeds)
    commit()
    for name in arguments.names:
        print(f"measuring {name}", file=sys.stderr, flush=True)
        began = time.monotonic()
        section = EXPERIMENTS[name](options)
        command = f"python -m benchmarks.placement {name}"
        command += " --quick" if options.quick else ""
        command += f" --time-scale {options.time_scale:g}" if options.time_scale != 1 else ""
        command += f" --seeds {options.seeds}" if name in _WITH_SEEDS and options.seeds != _SEEDS else ""
        markdown = section.markdown(command, time.monotonic() - began)
        print(markdown, end="\n\n", flush=True)
        if arguments.write is not None:
            section.write_into(arguments.write, markdown)
    return 0


if __name__ == "__main__":
    sys.exit(main())
