"""``python -m benchmarks.policies``: runs the experiments of docs/policies-experiments.md."""

from __future__ import annotations

import importlib
import sys
import time
from pathlib import Path

from benchmarks.policies import EXPERIMENTS, Options
from benchmarks.policies.report import Section
from benchmarks.report import checked, commit, parser_of
from kvservice.simulate import plot


def main() -> int:
    """Run, print and write the named experiments. Exit code 0 if all ran, even if a goal is missed."""
    quick = "smaller loads and fewer of them: under two minutes"
    parser = parser_of("python -m benchmarks.policies", __doc__, EXPERIMENTS, quick)
    parser.add_argument(
        "--traces", type=Path, metavar="FOLDER", help="where mooncake_conversation_trace.jsonl is; skipped without"
    )
    arguments = checked(parser, "experiment", EXPERIMENTS)
    if arguments.traces is not None and not arguments.traces.is_dir():
        parser.error(f"--traces: there is no folder {arguments.traces}")
    pictures = arguments.write.parent if arguments.write is not None and plot.is_available() else None
    options = Options(arguments.quick, arguments.traces, pictures)

    measures = {name: importlib.import_module(f"benchmarks.policies.{name}").measure for name in arguments.names}
    commit()
    for name, measure in measures.items():
        print(f"measuring {name}", file=sys.stderr, flush=True)
        began = time.monotonic()
        section: Section | None = measure(options)
        if section is None:
            print(f"{name} is skipped: it needs a trace, see --traces", file=sys.stderr)
            continue
        command = f"python -m benchmarks.policies {name}{' --quick' if arguments.quick else ''}"
        if section.needs_traces:
            command += " --traces FOLDER"
        markdown = section.markdown(command, time.monotonic() - began)
        print(markdown, end="\n\n", flush=True)
        if arguments.write is not None:
            section.write_into(arguments.write, markdown)
    return 0


if __name__ == "__main__":
    sys.exit(main())
