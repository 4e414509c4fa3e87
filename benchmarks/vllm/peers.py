"""KVService beside LMCache's multi-process connector: the same vLLM, model and conversations, in turns, in one run.

    .venv-vllm/bin/python -m benchmarks.vllm.peers

In an environment with vLLM (`make vllm-env`) to which LMCache was added without its dependencies:
`pip install --no-deps lmcache==0.5.6 aiofile caio aiofiles awscrt redis sortedcontainers google-api-core
opentelemetry-exporter-prometheus`. Prints a Markdown table; each figure is a median.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vllm.config import KVTransferConfig

from tests.daemon import MIB, DaemonProcess, until
from tests.vllm.engine import Engine, engine, model_folder  # Sets what vLLM reads when it is imported.

TIMES_VARIABLE = "KVSERVICE_HOOK_TIMES"  # Names the file for the times of `benchmarks.vllm.timed`, which vLLM imports.
_BLOCK = 256
_HISTORY = 1500
_NEW = 24
_STORED_S = 2.0
_PORT = 16555


def transfer(connector: str, **settings: Any) -> KVTransferConfig:
    return KVTransferConfig(
        kv_connector=connector,
        kv_connector_module_path="benchmarks.vllm.timed",
        kv_role="kv_both",
        kv_load_failure_policy="recompute",
        kv_connector_extra_config=settings,
    )


@contextmanager
def lmcache_server(folder: Path) -> Iterator[None]:
    command = [
        str(Path(sys.executable).with_name("lmcache")), "server", "--host", "127.0.0.1", "--port", str(_PORT),
        "--http-port", str(_PORT + 25), "--prometheus-port", str(_PORT + 35), "--l1-size-gb", "2",
        "--eviction-policy", "LRU", "--supported-transfer-mode", "auto", "--shm-name", f"lmc_{os.getpid()}",
        "--chunk-size", str(_BLOCK),
    ]  # fmt: skip
    ports = _PORT, _PORT + 25
    with (folder / "lmcache.log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            until(lambda: server.poll() is not None or all(map(_accepts, ports)))
            assert server.poll() is None, (folder / "lmcache.log").read_text()
            yield
        finally:
            server.terminate()
            server.wait(30)


def _accepts(port: int) -> bool:
    with socket.socket() as tried:
        return tried.connect_ex(("127.0.0.1", port)) == 0


class Measured:
    """One engine, and what its requests took."""

    def __init__(self, name: str, running: Engine, times: Path) -> None:
        self.name, self._engine, self._times = name, running, times
        self._read = 0
        self.figures: defaultdict[str, list[float]] = defaultdict(list)

    def ask(self, what: str, prompt: list[int], tokens: int) -> list[int]:
        self._hooks()
        answer = self._engine.answer(prompt, tokens)
        time.sleep(_STORED_S)  # Neither engine says when the saves of a turn are done.
        hooks = self._hooks()
        self.figures[f"{what}: first token"].append(answer.first_token_s * 1e3)
        self.figures[f"{what}: tokens from the store"].append(answer.cached_tokens)
        for role in ("scheduler", "worker"):
            self.figures[f"{what}: in the {role}'s hooks"].append(sum(ms for each, _, ms in hooks if each == role))
        loads = ("start_load_kv", "wait_for_layer_load")
        self.figures[f"{what}: load, in hooks"].append(sum(ms for _, hook, ms in hooks if hook in loads))
        saves = ("handle_preemptions", "bind_connector_metadata", "save_kv_layer", "wait_for_save")
        self.figures[f"{what}: save, in hooks"].append(sum(ms for _, hook, ms in hooks if hook in saves))
        return answer.token_ids

    def _hooks(self) -> list[tuple[str, str, float]]:
        lines = self._times.read_text().splitlines()
        new, self._read = lines[self._read :], len(lines)
        return [tuple(json.loads(line)) for line in new]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=7)
    given = parser.parse_args()
    if given.repetitions < 1:
        parser.error("--repetitions must be at least 1")
    if find_spec("lmcache") is None:
        parser.error("LMCache is not installed here: see above for the packages")
    model = model_folder()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        stack.enter_context(lmcache_server(folder))
        daemon = stack.enter_context(DaemonProcess(folder / "ours", dram__capacity_bytes=2048 * MIB))
        lmcache = {"lmcache.mp.host": "tcp://127.0.0.1", "lmcache.mp.port": _PORT}
        configurations = {
            "KVService": transfer("TimedKVService", address=daemon.address),
            "LMCache": transfer("TimedLMCache", **lmcache, **{"lmcache.mp.mp_transfer_mode": "engine_driven"}),
        }
        engines = []
        for name, configuration in configurations.items():
            times = folder / f"{name}.jsonl"
            times.touch()
            os.environ[TIMES_VARIABLE] = str(times)
            engines.append(Measured(name, stack.enter_context(engine(model, configuration, block_size=128)), times))
        for repetition in range(given.repetitions + 1):
            prompt = [(7 * repetition + 13 * each + each * each) % 49000 + 100 for each in range(_HISTORY)]
            new = [(31 * each + repetition) % 49000 + 100 for each in range(_NEW)]
            turn = engines[repetition % 2 :] + engines[: repetition % 2]
            answers = {each.name: each.ask("miss", prompt, 8) for each in turn}
            assert len({tuple(answer) for answer in answers.values()}) == 1
            longer = [*prompt, *answers["KVService"], *new]
            answers = {each.name: each.ask("hit", longer, 8) for each in turn}
            print(f"{repetition}: same tokens: {len({tuple(answer) for answer in answers.values()}) == 1}", flush=True)
            if not repetition:  # The first turns load what is loaded once.
                for each in engines:
                    each.figures.clear()
    print(f"\nLoad average {os.getloadavg()[0]:.1f}; medians of {given.repetitions}; in milliseconds, except tokens.\n")
    print("| | " + " | ".join(each.name for each in engines) + " |\n|---|" + "---:|" * len(engines))
    for what in engines[0].figures:
        print(f"| {what} | " + " | ".join(f"{statistics.median(each.figures[what]):.4g}" for each in engines) + " |")


if __name__ == "__main__":
    main()
