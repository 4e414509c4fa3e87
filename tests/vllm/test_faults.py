"""A real vLLM whose connector raises, or whose daemon is killed, stopped and restarted: the tokens are right anyway.

Of the hooks that raise, ``contract/test_raising_hooks.py`` has the fast tests.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from signal import SIGCONT
from typing import Any, NamedTuple

import pytest
from transformers import AutoTokenizer
from vllm import SamplingParams

from kvservice_adapter.connectors.vllm.settings import LoadMode
from kvservice_client import BlockCache, block_chain
from tests.daemon import MIB, DaemonProcess, until
from tests.vllm.engine import NOT_KEPT, Engine, engine, model_folder, model_layout, transfer_config, wait_until_stored
from tests.vllm.raising_connector import CASES, FAULT

BLOCK = 64
TOKENS = 5  # Of an answer.
TIE = 1e-4  # Two logits this close may change places when vLLM computes a request in another batch.
HANGS_S = 120.0  # An engine without an answer after that is killed, and its test fails.
LAYOUT = model_layout(block_tokens=BLOCK)


class Prompt(NamedTuple):
    token_ids: list[int]
    salt: str = ""  # Prompts of one text with different salts share nothing that is stored.
    kept: Mapping[str, Any] = NOT_KEPT  # The connector's parameters.
    tokens: int = TOKENS


@dataclass
class Answer:
    token_ids: list[int] = field(default_factory=list)
    cached_tokens: int = 0
    margins: list[float] = field(default_factory=list)  # By token: of the two largest logits.


@pytest.fixture(scope="module")
def fault(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The file that chooses what raises."""
    path = tmp_path_factory.mktemp("fault") / "fault"
    path.write_text("")
    os.environ[FAULT] = str(path)
    yield path
    del os.environ[FAULT]


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    folder = tmp_path_factory.mktemp("store")
    with DaemonProcess(folder, dram__capacity_bytes=512 * MIB, ssd__capacity_bytes=1024 * MIB) as daemon:
        yield daemon


@pytest.fixture(scope="module")
def vllm(daemon: DaemonProcess, fault: Path) -> Iterator[Engine]:
    settings = transfer_config(
        address=daemon.address,
        model_id=LAYOUT.model_id,
        model_revision=LAYOUT.model_revision,
        block_tokens=BLOCK,
        staging_bytes=64 * MIB,
    )
    settings.kv_connector = "RaisingConnector"
    settings.kv_connector_module_path = "tests.vllm.raising_connector"
    with engine(model_folder(), settings, block_size=32, max_num_seqs=16) as running:
        yield running


@pytest.fixture(scope="module")
def text() -> list[int]:
    """Token ids of a text without repetitions."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder())
    lines = (f"The ship of port {each} carries {each * each % 97} crates to port {each + 5}." for each in range(100))
    ids: list[int] = tokenizer.encode(" ".join(lines))
    return ids


@contextmanager
def killed_if_it_hangs(vllm: Engine) -> Iterator[None]:
    core: Any = vllm.llm.llm_engine.engine_core
    processes = core.resources.engine_manager.processes
    watch = threading.Timer(HANGS_S, lambda: [process.kill() for process in processes])
    watch.start()
    try:
        yield
    finally:
        watch.cancel()


def run(
    vllm: Engine, prompts: Sequence[Prompt], at_step: Mapping[int, Callable[[], object]] | None = None
) -> list[Answer]:
    """The answers to prompts that vLLM computes together.

    `at_step` are done between the steps in which vLLM returned tokens.
    """
    core = vllm.llm.llm_engine
    assert vllm.llm.reset_prefix_cache()
    answers = {str(index): Answer() for index in range(len(prompts))}
    for index, prompt in enumerate(prompts):
        parameters = SamplingParams(
            temperature=0,
            max_tokens=prompt.tokens,
            ignore_eos=True,
            logprobs=2,
            extra_args={"kv_transfer_params": {"kvservice": dict(prompt.kept)}},
        )
        given: Any = {"prompt_token_ids": prompt.token_ids}
        core.add_request(str(index), given | ({"cache_salt": prompt.salt} if prompt.salt else {}), parameters)
    step = 0
    with killed_if_it_hangs(vllm):
        while core.has_unfinished_requests():
            outputs = core.step()
            for output in outputs:
                answer, found = answers[output.request_id], output.outputs[0]
                answer.token_ids, answer.cached_tokens = list(found.token_ids), output.num_cached_tokens or 0
                answer.margins = [_margin(each) for each in found.logprobs or ()]
            step += bool(outputs)
            if outputs and at_step and step in at_step:
                at_step[step]()
    return list(answers.values())


def _margin(logprobs: Mapping[int, Any]) -> float:
    first, second, *_ = sorted((each.logprob for each in logprobs.values()), reverse=True)
    return float(first - second)


def check(answers: Sequence[Answer], expected: Sequence[Answer]) -> None:
    """The same tokens. Where a first other token is a tie of logits, vLLM may give either by itself: it is printed."""
    for index, (answer, right) in enumerate(zip(answers, expected, strict=True)):
        assert len(answer.token_ids) == len(right.token_ids)
        differing = [
            at for at, (one, two) in enumerate(zip(answer.token_ids, right.token_ids, strict=True)) if one != two
        ]
        if differing:
            margin = right.margins[differing[0]]
            assert margin < TIE, f"request {index}: {answer.token_ids}, not {right.token_ids} (by {margin:.2g})"
            print(f"request {index}: a tie of logits ({margin:.2g}) at token {differing[0]}")


@pytest.fixture(scope="module")
def stored(daemon: DaemonProcess) -> Iterator[BlockCache]:
    with daemon.client() as client:
        yield client.open_layout(LAYOUT)


class Conversations:
    """Eight prompts: two for each way to load, of which a prefix is stored, and two that are saved."""

    HISTORY = 2 * BLOCK + 30
    STORED = 6
    ALL = range(8)
    ONE_OF_EACH = (0, 1, 2, 6)

    def __init__(self, vllm: Engine, stored: BlockCache, text: list[int]) -> None:
        self._vllm, self._stored = vllm, stored
        self._histories = [[500 + index, *text[: self.HISTORY - 1]] for index in self.ALL]
        self._prompts = [[*history, *text[300:320]] for history in self._histories]
        self._expected = run(vllm, [Prompt(prompt) for prompt in self._prompts])
        self.store()

    def store(self) -> None:
        """Have the daemon keep the prefixes, if it does not."""
        for history in self._histories[: self.STORED]:
            chain = block_chain(LAYOUT, history, with_partial=True)
            if self._stored.contains(chain) < len(chain):  # One token of an answer, whose KV is not computed.
                run(self._vllm, [Prompt(history, kept={"may_load": False}, tokens=1)])
                wait_until_stored(self._stored, history)

    def run(
        self, which: Sequence[int], salt: str, at_step: Mapping[int, Callable[[], object]] | None = None
    ) -> list[int]:
        """Continue conversations together, and check their answers. Returns the tokens that were loaded of each.

        What is saved has a salt, and is found only by the same.
        """
        modes = [mode.value for mode in (LoadMode.WHOLE, LoadMode.LAYERS, LoadMode.BETWEEN_STEPS)]
        prompts = [
            Prompt(self._prompts[each], kept={"load": modes[each % 3], "may_save": False})
            if each < self.STORED
            else Prompt(self._prompts[each], salt, {"load": LoadMode.WHOLE.value})
            for each in which
        ]
        answers = run(self._vllm, prompts, at_step)
        check(answers, [self._expected[each] for each in which])
        return [answer.cached_tokens for each, answer in zip(which, answers, strict=True) if each < self.STORED]


@pytest.fixture(scope="module")
def conversations(vllm: Engine, stored: BlockCache, text: list[int]) -> Conversations:
    return Conversations(vllm, stored, text)


@pytest.mark.parametrize(("method", "moment"), CASES)
def test_a_hook_that_raises_at_each_call_changes_no_token(
    conversations: Conversations, fault: Path, method: str, moment: str
) -> None:
    salt, raised = f"{method} {moment}", fault.with_suffix(".raised")
    raised.unlink(missing_ok=True)
    fault.write_text(f"{method} {moment}")
    try:
        conversations.run(Conversations.ONE_OF_EACH, salt)
    finally:
        fault.write_text("")
    assert raised.exists()
    conversations.run(Conversations.ONE_OF_EACH, salt)  # What was saved meanwhile is right.
    hits_are_back(conversations)


def hits_are_back(conversations: Conversations) -> None:
    """Once a probe of the circuit breakers has found the daemon. On a busy machine a lookup may be late."""
    conversations.store()
    until(lambda: conversations.run([0, 1, 2], "") == [Conversations.HISTORY] * 3)


MOMENTS = ["on_new", "matched_tokens", "allocated", "start_loads", "wait_for_layer", "end_step"]


@pytest.mark.parametrize("method", MOMENTS)
@pytest.mark.parametrize("signal", ["SIGSTOP", "SIGKILL"])
def test_a_daemon_that_is_stopped_or_killed_during_a_hook_changes_no_token(
    vllm: Engine, conversations: Conversations, daemon: DaemonProcess, fault: Path, signal: str, method: str
) -> None:
    waited = fault.with_suffix(".waited")
    waited.unlink(missing_ok=True)
    salt = f"{method} {signal}"
    fault.write_text(f"{method} {signal} {daemon.process.pid}")
    try:
        conversations.run(Conversations.ALL, salt)
        conversations.run(Conversations.ALL, salt)
    finally:
        fault.write_text("")
        if signal == "SIGSTOP":
            daemon.process.send_signal(SIGCONT)
        else:
            daemon.wait_for_end()
            daemon.start()
    if waited.exists():
        print(f"{signal} in {method}: hooks took {waited.read_text().splitlines()}")
    hits_are_back(conversations)
    conversations.run(Conversations.ALL, salt)


def restart(daemon: DaemonProcess) -> None:
    daemon.kill()
    daemon.start()


def test_a_daemon_that_is_restarted_while_requests_run_changes_no_token(
    conversations: Conversations, daemon: DaemonProcess
) -> None:
    for step in (1, 2, 3):
        conversations.run(Conversations.ALL, f"restart {step}", {step: lambda: restart(daemon)})
    hits_are_back(conversations)
    for step in (1, 2, 3):
        conversations.run(Conversations.ALL, f"restart {step}")
