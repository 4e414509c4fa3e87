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
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import vllm
from transformers import AutoTokenizer

from kvservice_api.errors import RequestNotFound, SessionNotFound
from kvservice_api.v1 import blocks_pb2 as pb
from kvservice_client import Client, Layout, Session, block_chain
from tests.daemon import MIB, SOON_S, DaemonProcess, until
from tests.vllm.engine import NOT_KEPT, model_folder

ROOT = Path(__file__).resolve().parent.parent.parent
CONVERSATIONS, TURNS, TOKENS = 8, 3, 8
BLOCK = 256
TIE = 1e-4  # Two logits this close may change places when vLLM computes a request in another batch.
ANSWERED_S = 300.0


class Completion(NamedTuple):
    response_id: str
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

    def complete(self, prompt: Sequence[int], headers: Mapping[str, str] | None = None, **kept: Any) -> Completion:
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
        answer = json.loads(self.post("/v1/completions", body, headers))
        choice = answer["choices"][0]
        top = [sorted(each.values(), reverse=True) for each in choice["logprobs"]["top_logprobs"]]
        return Completion(answer["id"], choice["token_ids"], [first - second for first, second, *_ in top])

    def complete_all(
        self, prompts: Sequence[Sequence[int]], headers: Sequence[Mapping[str, str]] = (), **kept: Any
    ) -> list[Completion]:
        """All at the same time, after vLLM has dropped its own pages. `headers` are those of each request."""
        until(self.drop_pages)  # vLLM refuses while pages of a former request are in use.
        with ThreadPoolExecutor(len(prompts)) as threads:
            each = zip_longest(prompts, headers)
            return list(threads.map(lambda pair: self.complete(*pair, **kept), each))

    def drop_pages(self) -> bool:
        try:
            self.post("/reset_prefix_cache", {})
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

    def post(self, path: str, body: Mapping[str, Any], headers: Mapping[str, str] | None = None) -> str:
        request = urllib.request.Request(
            self._url + path, json.dumps(body).encode(), {"Content-Type": "application/json", **(headers or {})}
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
    patient = {"lookup_wait_s": SOON_S, "wait_s": SOON_S, "layer_wait_s": SOON_S}  # A busy machine answers late.
    settings["kv_connector_extra_config"].update(patient)
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
    headers = [{"X-Session-ID": f"chat-{each}"} if each % 2 else {} for each in range(CONVERSATIONS)]
    before, expected_hits, saved_tokens = server.metrics(), 0, [0] * CONVERSATIONS
    with Client(daemon.address) as client:
        for turn in range(TURNS):
            expected = server.complete_all(histories, **NOT_KEPT)
            answers = server.complete_all(histories, headers, load="whole")
            check(answers, expected)
            for answer, history, stored_tokens in zip(answers, histories, saved_tokens, strict=True):
                report = report_of(client, answer.response_id)
                outcome = pb.REQUEST_OUTCOME_DONE if turn else pb.REQUEST_OUTCOME_MISS
                assert report.outcome == outcome, report.outcome_reason
                assert report.history_tokens == report.loaded_tokens == stored_tokens
                assert report.new_tokens == len(history) - stored_tokens
                assert report.computed_tokens == 0
                assert report.transport == ("shm" if turn else "")
            histories = [history + answer.token_ids for history, answer in zip(histories, answers, strict=True)]
            saved_tokens = [len(history) - 1 for history in histories]  # vLLM has not computed the last tokens.
            wait_until_kept(client, headers, histories, saved_tokens)
            histories = [[*history, *text[400 + 60 * turn : 460 + 60 * turn]] for history in histories]
            expected_hits += sum(saved_tokens) if turn + 1 < TURNS else 0
        counters = client.admin.status().counters
    after = server.metrics()
    print({name: value for name, value in after.items() if "kvservice" in name or "external" in name}, dict(counters))
    hits = CONVERSATIONS * (TURNS - 1)
    counted = {"kvservice_hits": hits, "kvservice_hit_tokens": expected_hits, "kvservice_loads": hits}
    for name, value in {"external_prefix_cache_hits": expected_hits, **counted, "kvservice_failed_loads": 0}.items():
        assert after.get(f"vllm:{name}_total", 0) - before.get(f"vllm:{name}_total", 0) == value, name


def report_of(client: Client, response_id: str) -> pb.RequestReport:
    """What `kvctl explain` shows of a response: how its request went. Reports arrive in the background."""
    reports: list[pb.RequestReport] = []

    def has_arrived() -> bool:
        with suppress(RequestNotFound):
            reports.extend(each.report for each in client.admin.explain_request(response_id).reports)
        return bool(reports)

    until(has_arrived)
    (report,) = reports
    return report


def wait_until_kept(
    client: Client,
    headers: Sequence[Mapping[str, str]],
    histories: Sequence[Sequence[int]],
    saved_tokens: Sequence[int],
) -> None:
    """Until all blocks of the conversations are stored, and the sessions name them, and no other."""
    sessions = [each.get("X-Session-ID", "") for each in headers]
    layout = layout_of(client, next(filter(None, sessions)))
    blocks = client.open_layout(layout)
    for session_id, history, tokens in zip(sessions, histories, saved_tokens, strict=True):
        chain = block_chain(layout, history[:tokens], with_partial=True)
        if not session_id:
            until(lambda chain=chain: blocks.contains(chain) == len(chain))  # type: ignore[misc]
            continue
        session = client.session(layout, session_id)
        until(lambda session=session, count=tokens: exists(session) and session.get().token_count == count)  # type: ignore[misc]
        state = session.get()
        assert tuple(each.key for each in state.slices) == chain.keys
        assert state.stored_tokens == tokens


def layout_of(client: Client, session_id: str) -> Layout:
    """The layout that the server has, as the daemon knows it, once a session of it exists."""
    found: list[Layout] = []

    def is_known() -> bool:
        with suppress(SessionNotFound):
            sessions = client.admin.explain_session(session_id)
            found.extend(Layout.from_proto(each.layout, each.session.layout_fingerprint) for each in sessions)
        return bool(found)

    until(is_known)
    return found[0]


def exists(session: Session) -> bool:
    try:
        session.get()
    except SessionNotFound:
        return False
    return True


def test_a_chat_with_a_session_id_in_its_body_or_its_header_is_kept_also_if_its_answer_is_streamed(
    server: Server, daemon: DaemonProcess
) -> None:
    if daemon.process.poll() is not None:
        daemon.start()
    sentence = "Count from one to a thousand, in words, and leave out each seventh number. "
    body = {"messages": [{"role": "user", "content": sentence * 15}], "max_tokens": 4, "temperature": 0}
    of_entry = {"kv_transfer_params": {"kvservice": {"session_id": "of-the-entry"}}}
    with Client(daemon.address) as client:
        answered = server.post("/v1/chat/completions", {**body, "stream": True}, {"X-Session-ID": "streamed"})
        first, _ = json.JSONDecoder().raw_decode(answered.removeprefix("data: "))
        tokens = client.session(layout_of(client, "streamed"), "streamed").get().token_count
        report = report_of(client, first["id"])
        assert report.new_tokens + report.history_tokens + 4 - 1 == tokens
        for session_id, more, header in (
            ("of-the-field", {"session_id": "of-the-field"}, "unused"),
            ("of-the-entry", of_entry, "unused"),
            ("of-the-header", {}, "of-the-header"),
        ):
            until(server.drop_pages)
            named = {"X-Request-Id": f"mine-{session_id}", "X-Session-ID": header}
            server.post("/v1/chat/completions", {**body, **more}, named)
            assert client.session(layout_of(client, session_id), session_id).get().token_count == tokens
            report = report_of(client, f"chatcmpl-mine-{session_id}")
            assert report.outcome == pb.REQUEST_OUTCOME_DONE
            assert report.history_tokens == BLOCK
        prompt = {"input": sentence * 15, "max_output_tokens": 4, "temperature": 0}
        response = json.loads(server.post("/v1/responses", prompt, {"X-Session-ID": "of-a-response"}))
        assert client.session(layout_of(client, "of-a-response"), "of-a-response").get().token_count == tokens
        assert report_of(client, response["id"]).outcome == pb.REQUEST_OUTCOME_DONE
        assert "unused" not in {each.session_id for each in client.admin.list_sessions()}


def test_wrong_parameters_and_session_ids_in_a_request_cost_nothing_but_a_line(
    server: Server, daemon: DaemonProcess, text: list[int]
) -> None:
    expected = server.complete_all([text[:40]], **NOT_KEPT)
    wrong: Any = {"load": "fast", "may_load": 7, "x": [1], "session_id": {"a": 1}}
    check(server.complete_all([text[:40]], [{"X-Session-ID": "not an id"}], **wrong), expected)
    check(server.complete_all([text[:40]], [{"X-Session-ID": "not an id"}]), expected)
    with Client(daemon.address) as client:
        assert not any(client.admin.list_sessions("not an id"))
