"""``python -m benchmarks.queue``: the time to the first token in a queue of conversations, with real engines.

Every conversation has a history in the daemon: all of them on SSD, the last third in DRAM too. In each turn all of
them ask at the same time. Each round serves the queue in every way, in rotated order: with each history computed
again, and with the daemon's policies. Times are from the arrival in the queue. Run it where vLLM is installed
(`make vllm-env`), or name `transformers`.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # torch reads it at import.

from benchmarks.queue.conversations import ANSWER_TOKENS, NEW_TOKENS, Runs, Size, Way, settings_of
from benchmarks.queue.report import picture, rows_of, table
from benchmarks.report import checked, parser_of, where_and_when, write_section
from examples.models import ModelNotFound, load_model
from tests.daemon import DaemonProcess

ENGINES = ("transformers", "vllm")
POLICIES = ("lru", "lookahead", "foresight")
_USUAL = Size(conversations=16, history_tokens=1000, turns=2, rounds=3)
_QUICK = Size(conversations=6, history_tokens=280, turns=1, rounds=1)
_MODEL_TOKENS = 4096  # The longest prompt that the engines are started for.


def ways_of(engine: str, policies: Sequence[str]) -> list[Way]:
    """The first one is what the others are compared with."""
    ways = [Way("computed again", ""), Way("lru, no hints", "lru", hints=False)]
    ways += [Way(policy, policy) for policy in policies]
    if engine == "transformers":
        ways += [Way(f"{policy}, ready first", policy, ready_first=True) for policy in policies]
    return ways


def measure(engine: str, size: Size, policies: Sequence[str]) -> Runs:
    """All runs of one engine. Raises ModelNotFound."""
    from benchmarks.queue import engines

    loaded = load_model()
    if engine == "transformers":
        from kvservice_adapter.connectors.transformers.model_layout import layout_of

        layout = layout_of(loaded.model, model_id=loaded.model_id, model_revision="", block_tokens=256)
    else:
        from tests.vllm.engine import model_folder, model_layout

        layout = model_layout()
    with (
        tempfile.TemporaryDirectory(prefix="kvservice-queue-") as folder,
        DaemonProcess(Path(folder), **settings_of(size, layout)) as daemon,
        daemon.client() as client,
        engines.transformers_engine(daemon, loaded)
        if engine == "transformers"
        else engines.vllm_engine(daemon, model_folder(), size, client) as running,
    ):
        runs = Runs(running, daemon, client, size)
        runs.run(ways_of(engine, policies))
    return runs


def main() -> int:
    """Measure, print, and write with `--write`. Exit code 1 if the model is not installed."""
    parser = parser_of("python -m benchmarks.queue", __doc__, ENGINES, "six short conversations, one round")
    parser.add_argument("--conversations", type=int, default=_USUAL.conversations)
    history = "of each conversation; 1000"
    parser.add_argument("--history", type=int, default=_USUAL.history_tokens, metavar="TOKENS", help=history)
    parser.add_argument("--turns", type=int, default=_USUAL.turns, help="of each conversation; 2")
    parser.add_argument("--rounds", type=int, default=_USUAL.rounds, help="of which the medians are shown; 3")
    parser.add_argument("--policies", nargs="+", default=POLICIES, help=f"of the daemon; {' '.join(POLICIES)}")
    given = checked(parser, "engine", ENGINES)
    size = Size(given.conversations, given.history, given.turns, given.rounds)
    if given.quick:
        if size != _USUAL:
            parser.error("--quick has a size of its own: leave out --conversations, --history, --turns and --rounds")
        size = _QUICK
    if size.conversations < 3 or min(size) < 1:
        parser.error("--history, --turns and --rounds must be at least 1, and --conversations at least 3")
    if size.conversation_tokens > _MODEL_TOKENS - 1:
        parser.error(f"a conversation has up to {size.conversation_tokens} tokens; it may have {_MODEL_TOKENS - 1}")
    if unknown := set(given.policies) - {"lru", "fifo", "s3fifo", "lookahead", "foresight"}:
        parser.error(f"--policies: the daemon has no {', '.join(sorted(unknown))}")
    if "vllm" in given.names and find_spec("vllm") is None:
        parser.error("vLLM is not installed here: use .venv-vllm/bin/python (make vllm-env), or name transformers")
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # Unwind, so that the daemon stops.
    for engine in given.names:
        began_s = time.monotonic()
        try:
            runs = measure(engine, size, given.policies)
        except ModelNotFound as error:
            print(error, file=sys.stderr)
            return 1
        rows = rows_of(runs.results)
        options = (
            "--quick"
            if given.quick
            else (
                f"--conversations {size.conversations} --history {size.history_tokens} --turns {size.turns} "
                f"--rounds {size.rounds} --policies {' '.join(given.policies)}"
            )
        )
        minutes = (time.monotonic() - began_s) / 60
        about = (
            f"### The time to the first token in a queue: {engine}\n\n{where_and_when()} Reproduce with "
            f"`.venv-vllm/bin/python -m benchmarks.queue {engine} {options}` ({minutes:.0f} minutes).\n\n"
            f"SmolLM2-135M in fp32, one thread. {size.conversations} conversations of {size.history_tokens} tokens ask "
            f"at once, with {NEW_TOKENS} new tokens, and get {ANSWER_TOKENS}; turns: {size.turns}. All histories are "
            f"on SSD, and DRAM has space for a third. Times are from the arrival in the queue; medians, rounds: "
            f"{size.rounds}. `in DRAM`: requests whose whole stored history was in DRAM when the engine decided to "
            f"load it; `load`: the median load. Answers that differ from those of the first run: {runs.differing}.\n\n"
        )
        markdown = about + "\n".join(table(rows))
        print(markdown, end="\n\n", flush=True)
        if given.write is not None:
            file = given.write.parent / f"queue-{engine}.svg"
            file.write_text(picture(rows, f"Time to the first token, {engine}"))
            markdown += f"\n\n![Time to the first token in a queue with {engine}]({file.name})"
            write_section(given.write, f"queue bench {engine}", markdown)
    return 0


if __name__ == "__main__":
    sys.exit(main())
