"""``python -m kvservice_adapter.demo``: a conversation whose history comes back from the daemon."""

from __future__ import annotations

import argparse
import json
import signal
import sys

from kvservice_adapter.demo import report
from kvservice_adapter.demo.conversation import hold_conversation
from kvservice_adapter.demo.processes import ProcessFailed


def main() -> int:
    """Exit codes: 0 all answers identical, 1 not, or the demo could not run."""
    parser = argparse.ArgumentParser(prog="make demo", description=__doc__)
    parser.add_argument("--model", default="", help="a GGUF file, a folder, or a model of the hub")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    arguments = parser.parse_args()

    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # So that the daemon does not stay.

    if not arguments.json:
        print(report.header())
    turns = []
    try:
        for turn in hold_conversation(arguments.model, note=lambda text: print(text, file=sys.stderr, flush=True)):
            turns.append(turn)
            if turn.trouble:
                print(turn.trouble, file=sys.stderr)
            if not arguments.json:
                print(report.row(len(turns), turn), flush=True)
    except ProcessFailed as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    print(json.dumps(report.as_object(turns), indent=2) if arguments.json else report.totals(turns))
    return 0 if all(turn.identical for turn in turns) else 1


if __name__ == "__main__":
    sys.exit(main())
