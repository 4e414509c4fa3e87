"""`vllm serve` as the page on vLLM says: conversations over HTTP come back from a daemon, with the same tokens."""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import vllm
from transformers import AutoTokenizer

from kvservice_client import Client
from tests.daemon import MIB, SOON_S, DaemonProcess, until
from tests.vllm.engine import NOT_KEPT, model_folder

ROOT = Path(__file__).resolve().parent.parent.parent
CONVERSATIONS, TURNS, TOKENS = 8, 3, 8
BLOCK = 256
TIE = 1e-4  # Two logits this close may change places when vLLM computes a request in another batch.
ANSWERED_S = 300.0


class Completion(NamedTuple):
    token_ids: list[int]
    margins: list[float]  # By token: of the two largest logits.


class Server:
    """The OpenAI API of one `vllm serve`."""

    def __init__(self, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}"

    def is_up(self) -> bool:
        try:
            self._get("/health")
        except (urllib.error.URLError, ConnectionError):
            return False
        return True

    def complete(self, prompt: Sequence[int], **kept: Any) -> Completion:
        """`kept` are the connector's parameters of the request."""
        body = {
            "prompt": list(prompt),
            "max_tokens": TOKENS,
            "temperature": 0,
            "ignore_eos": True,
            "logprobs": 2,
            "return_token_ids": True,
            **({"kv_transfer_params": {"kvservice": kept}} if kept else {}),
        }
        choice = json.loads(self._post("/v1/completions", body))["choices"][0]
        top = [sorted(each.values(), reverse=True) for each in choice["logprobs"]["top_logprobs"]]
        return Completion(choice["token_ids"], [first - second for first, second, *_ in top])

    def complete_all(self, prompts: Sequence[Sequence[int]], **kept: Any) -> list[Completion]:
        """All at the same time, after vLLM has dropped its own pages."""
        until(self._drop_pages)  # vLLM refuses while pages of a former request are in use.
        with ThreadPoolExecutor(len(prompts)) as threads:
            return list(threads.map(lambda prompt: self.complete(prompt, **kept), prompts))

    def _drop_pages(self) -> bool:
        try:
            self._post("/reset_prefix_cache", {})
        except urllib.error.HTTPError:
            return False
        return True

    def metrics(self) -> Mapping[str, float]:
        """By name, the sum over labels."""
        values: dict[str, float] = {}
        for line in self._get("/metrics").splitlines():
            if not line.startswith("#"):
                name, _, value = line.rpartition(" ")
                name = name.partition("{")[0]
                values[name] = values.get(name, 0.0) + float(value)
        return values

    def _get(self, path: str) -> str:
        with urllib.request.urlopen(self._url + path, timeout=ANSWERED_S) as answer:
            return str(answer.read().decode())

    def _post(self, path: str, body: Mapping[str, Any]) -> str:
        request = urllib.request.Request(
            self._url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=ANSWERED_S) as answer:
            return str(answer.read().decode())


def documented_command(model: Path, address: str) -> list[str]:
    """The quick start's command, with this model and this daemon."""
    page = (ROOT / "docs" / "vllm.md").read_text()
    begin = page.index("vllm serve MODEL")
    command = page[begin : page.index("```", begin)]
    assert command.count("127.0.0.1:7070") == 1
    words = shlex.split(command.replace("MODEL", str(model)).replace("127.0.0.1:7070", address))
    settings = json.loads(words[-1])
    settings["kv_connector_extra_config"]["lookup_wait_s"] = SOON_S  # A busy machine answers no lookup in 20 ms.
    return [*words[:-1], json.dumps(settings)]


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    """It is not running yet, and its port is known."""
    folder = tmp_path_factory.mktemp("store")
    with DaemonProcess(folder, dram__capacity_bytes=512 * MIB, ssd__capacity_bytes=1024 * MIB) as daemon:
        daemon.stop()
        yield daemon


@pytest.fixture(scope="module")
def server(daemon: DaemonProcess, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program, *arguments = documented_command(model_folder(), daemon.address)
    for_a_small_machine = ["--dtype=float32", "--enforce-eager", "--max-model-len=2048"]
    folder = tmp_path_factory.mktemp("vllm")
    _describe_vllm(folder / "vllm.dist-info")
    paths = [str(folder), *(str(ROOT / name) for name in ("", "proto", "client", "engine_adapter"))]
    log = folder / "log"
    with log.open("w") as lines:
        process = subprocess.Popen(
            [str(Path(sys.executable).with_name(program)), *arguments, *for_a_small_machine, f"--port={port}"],
            stdout=lines,
            stderr=lines,
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "VLLM_SERVER_DEV_MODE": "1"},
        )
        try:
            running = Server(port)
            until(lambda: running.is_up() or process.poll() is not None, ANSWERED_S)
            assert process.poll() is None, log.read_text()
            yield running
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _describe_vllm(folder: Path) -> None:
    """The command asks for the version of the package `vllm`; the build for CPUs has another name, and then it ends."""
    folder.mkdir()
    folder.joinpath("METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {vllm.__version__}+cpu\n")


@pytest.fixture(scope="module")
def text() -> list[int]:
    """Token ids of a text without repetitions."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder())
    lines = (
        f"The train of line {each} stops at station {each * each % 83} for {each % 7} hours." for each in range(99)
    )
    ids: list[int] = tokenizer.encode(" ".join(lines))
    return ids


def check(answers: Sequence[Completion], expected: Sequence[Completion]) -> None:
    """The same tokens. Where a first other token is a tie of logits, vLLM may give either by itself: it is printed."""
    for index, (answer, right) in enumerate(zip(answers, expected, strict=True)):
        pairs = zip(answer.token_ids, right.token_ids, right.margins, strict=True)
        margins = [margin for one, two, margin in pairs if one != two]
        assert not margins or margins[0] < TIE, f"{index}: {answer.token_ids}, not {right.token_ids} ({margins[0]:.2g})"
        if margins:
            print(f"request {index}: a tie of logits ({margins[0]:.2g})")


def test_a_server_that_started_without_a_daemon_answers_and_uses_the_daemon_once_it_runs(
    server: Server, daemon: DaemonProcess, text: list[int]
) -> None:
    prompt = [99, *text[: BLOCK + 20]]
    expected = server.complete_all([prompt], **NOT_KEPT)
    check(server.complete_all([prompt]), expected)
    daemon.start()

    def is_found() -> bool:
        before = server.metrics()["vllm:external_prefix_cache_hits_total"]
        check(server.complete_all([prompt]), expected)
        return server.metrics()["vllm:external_prefix_cache_hits_total"] > before

    until(is_found)


def test_concurrent_conversations_over_http_come_back_with_the_same_tokens(
    server: Server, daemon: DaemonProcess, text: list[int]
) -> None:
    if daemon.process.poll() is not None:
        daemon.start()
    histories = [[200 + each, *text[: BLOCK + 14 - each]] for each in range(CONVERSATIONS)]
    before, expected_hits = server.metrics(), 0
    with Client(daemon.address) as client:
        admin = client.admin
        stored = admin.status().blocks
        for turn in range(TURNS):
            expected = server.complete_all(histories, **NOT_KEPT)
            answers = server.complete_all(histories, load="whole")
            check(answers, expected)
            histories = [history + answer.token_ids for history, answer in zip(histories, answers, strict=True)]
            saved = sum(len(history) - 1 for history in histories)  # vLLM has not computed the last tokens.
            stored += CONVERSATIONS * (2 if turn == 0 else 1)  # In the first turn a whole block each, and its tail.
            until(lambda count=stored: admin.status().blocks >= count)  # type: ignore[misc]
            histories = [[*history, *text[400 + 60 * turn : 460 + 60 * turn]] for history in histories]
            expected_hits += saved if turn + 1 < TURNS else 0
        counters = admin.status().counters
    after = server.metrics()
    print({name: value for name, value in after.items() if "kvservice" in name or "external" in name}, dict(counters))
    hits = CONVERSATIONS * (TURNS - 1)
    counted = {"kvservice_hits": hits, "kvservice_hit_tokens": expected_hits, "kvservice_loads": hits}
    for name, value in {"external_prefix_cache_hits": expected_hits, **counted, "kvservice_failed_loads": 0}.items():
        assert after[f"vllm:{name}_total"] - before[f"vllm:{name}_total"] == value, name
