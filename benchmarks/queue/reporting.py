"""Processor time of an engine's thread that reports its queue: ``python -m benchmarks.queue.reporting``.

A client of a daemon of its own reports queues of several lengths. Each request names a session that does not exist, so
the daemon promotes nothing.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from statistics import median

from benchmarks import leftovers
from benchmarks.client import parts
from benchmarks.report import markdown_table, where_and_when
from kvservice_client import Client, Layout, QueuedRequest
from kvservice_client.hints import EngineHints

_LAYOUT = Layout("bench-queue", "float16", layers=1, kv_heads=1, k_head_dim=8, v_head_dim=8)
_LENGTHS = (100, 1_000, 8_000)
_TIMES = 9
_STEP_S = 0.1  # An engine computes between two calls, and the client's thread sends meanwhile.
_DRAM_BYTES = 64 << 20


def _ms(call: Callable[[], object]) -> float:
    """Processor time of this thread: other programs, and the thread that sends, do not count."""
    time.sleep(_STEP_S)
    began_s = time.thread_time()
    call()
    return (time.thread_time() - began_s) * 1e3


def _put_and_remove(hints: EngineHints, request: QueuedRequest) -> None:
    hints.put(request)
    hints.remove(request.request_id)


def measure(client: Client, length: int) -> list[str]:
    """The row of one length: medians."""
    hints, session = client.hints(), client.session(_LAYOUT, "conversation")

    def requests(name: str, count: int) -> list[QueuedRequest]:
        return [QueuedRequest(f"{name} {number}", session) for number in range(count)]

    whole, one, single = [], [], []
    for turn in range(_TIMES):
        queue = requests(f"turn {turn}", length)
        whole.append(_ms(partial(hints.set_queue, queue)))
        queue = [*queue[1:], *requests(f"new {turn}", 1)]
        one.append(_ms(partial(hints.set_queue, queue)))
        (extra,) = requests(f"extra {turn}", 1)
        single.append(_ms(partial(_put_and_remove, hints, extra)))
    hints.set_queue([])
    return [f"{length:,}", *(f"{median(each):.3g} ms" for each in (whole, one)), f"{median(single) * 1e3:.3g} us"]


def main() -> None:
    argparse.ArgumentParser(prog="python -m benchmarks.queue.reporting", description=__doc__).parse_args()
    leftovers.begin(None)
    with (
        leftovers.own_folder(None) as folder,
        parts.daemon(folder, leftovers.SHARED_MEMORY, _DRAM_BYTES, 0) as daemon,
        Client(daemon.address) as client,
    ):
        rows = [measure(client, length) for length in _LENGTHS]
    columns = ["Requests", "`set_queue`, all new", "`set_queue`, one new", "`put` and `remove`"]
    print(where_and_when(), *markdown_table(columns, rows), sep="\n")


if __name__ == "__main__":
    main()
