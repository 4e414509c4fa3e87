"""``python -m benchmarks.policies``: runs the experiments of docs/policies.md."""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from pathlib import Path

from benchmarks.policies import EXPERIMENTS, Options
from benchmarks.policies.report import Section
from benchmarks.report import commit
from kvservice.simulate import plot


def main() -> int:
    """Run, print and write the named experiments. Exit code 0 if all ran, even if a goal is missed."""
    known = ", ".join(EXPERIMENTS)
    parser = argparse.ArgumentParser(prog="python -m benchmarks.policies", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {known}; all of them if none is given")
    parser.add_argument("--quick", action="store_true", help="smaller loads and fewer of them: under two minutes")
    parser.add_argument("--write", type=Path, metavar="FILE", help="also write the sections into this Markdown file")
    parser.add_argument(
        "--traces", type=Path, metavar="FOLDER", help="where mooncake_conversation_trace.jsonl is; skipped without"
    )
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(EXPERIMENTS):
        parser.error(f"no experiment is called {', '.join(sorted(unknown))}; there are {known}")
    if (
        arguments.write is not None and not arguments.write.parent.is_dir()
    ):  # Fail before the experiments, not after them.
        parser.error(f"--write: there is no folder {arguments.write.parent}")
    if arguments.traces is not None and not arguments.traces.is_dir():
        parser.error(f"--traces: there is no folder {arguments.traces}")
    pictures = arguments.write.parent if arguments.write is not None and plot.is_available() else None
    options = Options(arguments.quick, arguments.traces, pictures)

    names = arguments.names or EXPERIMENTS
    measures = {name: importlib.import_module(f"benchmarks.policies.{name}").measure for name in names}
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
