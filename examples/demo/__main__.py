"""``python -m examples.demo``: a conversation that loads its history from the daemon."""

from __future__ import annotations

import argparse
import json
import signal
import sys

from examples.demo import report
from examples.demo.conversation import hold_conversation

_WINDOW_TOKENS = 1024


def main() -> int:
    """Exit codes: 0 all answers identical, 1 not, or the demo could not run."""
    parser = argparse.ArgumentParser(prog="make demo", description=__doc__)
    parser.add_argument("--model", default="", help="a GGUF file, a folder, or a model of the hub")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--overflow", action="store_true", help="in a window that the conversation overflows")
    parser.add_argument("--window", type=int, help=f"tokens, with --overflow (default: {_WINDOW_TOKENS})")
    arguments = parser.parse_args()
    overflow = arguments.overflow
    if arguments.window is not None and not overflow:
        parser.error("--window goes with --overflow")
    window_tokens = _WINDOW_TOKENS if arguments.window is None else arguments.window
    if window_tokens < 1:
        parser.error("--window must be a number of tokens")

    # Unwind the stack, so that the daemon stops.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))

    def log(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    if not arguments.json:
        print(report.header(overflow))
    turns = []
    try:
        for turn in hold_conversation(arguments.model, log, window_tokens if overflow else None):
            turns.append(turn)
            if turn.problem:
                log(turn.problem)
            if not arguments.json:
                print(report.row(len(turns), turn, overflow), flush=True)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    print(json.dumps(report.as_object(turns, overflow), indent=2) if arguments.json else report.totals(turns, overflow))
    return 0 if all(turn.identical for turn in turns) else 1


if __name__ == "__main__":
    sys.exit(main())
