"""A real vLLM whose connector raises, or whose daemon is killed, stopped and restarted: the tokens are right anyway."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from transformers import AutoTokenizer
from vllm import SamplingParams

from kvservice_adapter.connectors.vllm.settings import LoadMode
from kvservice_client import BlockCache, Layout, Rotary, block_chain
from tests.daemon import MIB, DaemonProcess, until
from tests.vllm.engine import NOT_KEPT, Engine, engine, model_folder, transfer_config
from tests.vllm.raising_connector import FAULT, SCHEDULER_HOOKS, WORKER_HOOKS

BLOCK = 64
TOKENS = 5  # Of an answer.
TIE = 1e-4  # Two logits this close may change places when vLLM computes a request in another batch.
HANGS_S = 240.0  # An engine that has not answered then does not answer: it is killed, and its test fails.
LAYOUT = Layout(
    "smollm2",
    "float32",
    layers=30,
    kv_heads=3,
    k_head_dim=64,
    v_head_dim=64,
    model_revision="test",
    block_tokens=BLOCK,
    rotary=Rotary("default", "half", 64, 100000.0),
)


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
    """A prompt for each way to load, of which a prefix is stored, and one that is saved. All are computed together."""

    HISTORY = 2 * BLOCK + 30

    def __init__(self, vllm: Engine, stored: BlockCache, text: list[int]) -> None:
        self._histories = [[500 + index, *text[: self.HISTORY - 1]] for index in range(4)]
        for history in self._histories[:3]:
            run(vllm, [Prompt(history, kept={"may_load": False}, tokens=1)])  # Its KV is not computed: it is the last.
            chain = block_chain(LAYOUT, history, with_partial=True)
            until(lambda chain=chain: stored.contains(chain) == len(chain))  # type: ignore[misc]
        self._prompts = [[*history, *text[300:320]] for history in self._histories]
        self.expected = run(vllm, [Prompt(prompt) for prompt in self._prompts])

    def prompts(self, salt: str) -> list[Prompt]:
        modes = (LoadMode.WHOLE, LoadMode.LAYERS, LoadMode.BETWEEN_STEPS)
        kept = [{"load": mode.value, "may_save": False} for mode in modes]
        return [
            *(Prompt(prompt, kept=each) for prompt, each in zip(self._prompts, kept, strict=False)),
            Prompt(self._prompts[3], salt, {"load": "whole"}),
        ]


@pytest.fixture(scope="module")
def conversations(vllm: Engine, stored: BlockCache, text: list[int]) -> Conversations:
    return Conversations(vllm, stored, text)


# What a `take_...` method has taken is in its answer: an error after it is no error of that method.
CASES = [
    (method, moment)
    for method in (*SCHEDULER_HOOKS, *WORKER_HOOKS, "take_stats")
    for moment in ("before", "after")
    if moment == "before" or not (method.startswith("take_") or method == "orders_of_step")
]
FAST = {("allocated", "before"), ("start_loads", "after"), ("wait_for_layer", "before"), ("take_finished", "before")}


@pytest.mark.parametrize(
    ("method", "moment"), [pytest.param(*case, marks=[pytest.mark.fast] if case in FAST else []) for case in CASES]
)
def test_a_hook_that_raises_at_each_call_changes_no_token(
    vllm: Engine, conversations: Conversations, fault: Path, method: str, moment: str
) -> None:
    salt, raised = f"{method} {moment}", fault.with_suffix(".raised")
    raised.unlink(missing_ok=True)
    fault.write_text(f"{method} {moment}")
    try:
        answers = run(vllm, conversations.prompts(salt))
    finally:
        fault.write_text("")
    assert raised.exists()
    check(answers, conversations.expected)
    after = run(vllm, conversations.prompts(salt))  # What was saved meanwhile is right, and hits are back.
    check(after, conversations.expected)
    assert [answer.cached_tokens for answer in after[:3]] == [Conversations.HISTORY] * 3
