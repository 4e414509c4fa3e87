"""A conversation that exceeds its window, with the daemon and in memory: the same KV, and the same answers.

With tiny models and a daemon that is killed meanwhile; and one slow test of the program as users run it.
"""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from examples.demo.engine import Engine, State
from examples.demo.in_memory import EngineInMemory
from examples.models import LoadedModel
from kvservice_adapter.session import Conversation
from kvservice_client import Client
from tests.daemon import DaemonProcess
from tests.unit.adapter.test_demo_windowed import Letters
from tests.unit.rotary_models import OPTIONS, rotary_model, states

WINDOW_TOKENS, BLOCK_TOKENS, PATIENCE_S = 200, 16, 20.0
_QUESTIONS = ("Which engines are there?", "What became of the first one?", "And who drove it, on which line?")


class LettersOf97(Letters):
    """Of as many as the tiny models know."""

    eos_token_id = 96

    def __call__(self, text: str, **options: Any) -> Any:
        ids = [ord(letter) % OPTIONS["vocab_size"] for letter in text]
        return type("Ids", (), {"input_ids": ids})

    def decode(self, token_ids: list[int], **options: Any) -> str:
        return "".join(chr(token + 160) for token in token_ids)


def connected(address: str, loaded: LoadedModel) -> tuple[Engine, Client]:
    """The state of an engine's process at its start."""
    client = Client(address, timeout_s=PATIENCE_S)
    return Engine(client, loaded, block_tokens=BLOCK_TOKENS, wait_s=PATIENCE_S), client


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("llama", torch.bfloat16),
        pytest.param("llama, yarn", torch.float32, marks=pytest.mark.slow),
        pytest.param("glm, interleaved, half of the dims", torch.float32, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_over_several_overflows_and_a_kill_the_daemon_gives_what_memory_has_bit_for_bit(
    name: str, dtype: torch.dtype, new_daemon: Callable[..., DaemonProcess]
) -> None:
    daemon, loaded = new_daemon(), LoadedModel(rotary_model(name, dtype), LettersOf97(), "tiny", "1")
    engine, client = connected(daemon.address, loaded)
    in_memory = EngineInMemory(loaded)
    messages, dropped = [{"role": "system", "content": "Be kind."}], []
    state: State = Conversation("chat"), []
    for turn in range(9):
        messages.append({"role": "user", "content": _QUESTIONS[turn % 3]})
        expected_ids, _ = in_memory.answer(messages, WINDOW_TOKENS)

        answered, state = engine.answer_in_window(messages, WINDOW_TOKENS, state)

        assert answered.problem == ""
        assert answered.answer_ids == expected_ids
        assert answered.reused_tokens == answered.history_tokens
        assert answered.history_tokens + answered.new_tokens + 32 <= WINDOW_TOKENS
        messages.append({"role": "assistant", "content": answered.answer})
        dropped.append(answered.dropped_tokens)
        if turn == 5:
            daemon.kill()
            engine.connector.close()
            client.close()
            daemon.start()
            engine, client = connected(daemon.address, loaded)
            state = pickle.loads(pickle.dumps(state))  # It goes to another process.

    assert sum(count > 0 for count in dropped) >= 3
    assert any(dropped[6:])  # After the kill too.
    conversation, _ = state
    history = engine.connector.restore([*conversation.token_ids, 5], conversation=conversation)
    with torch.inference_mode():
        loaded.model(torch.tensor([[5]]), past_key_values=history.cache)
    for (keys, values), (kept_keys, kept_values) in zip(states(history.cache), states(in_memory.cache()), strict=True):
        assert torch.equal(keys[:, :, :-1], kept_keys)
        assert torch.equal(values[:, :, :-1], kept_values)
    engine.connector.close()
    client.close()


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The JSON object of the demo with the real model. The program must print nothing else."""
    done = subprocess.run(
        [sys.executable, "-m", "examples.demo", "--overflow", "--json"],
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
        env={**os.environ, "TMPDIR": str(tmp_path_factory.mktemp("demo"))},
    )
    assert done.returncode == 0, done.stderr
    shown: dict[str, Any] = json.loads(done.stdout)
    return shown


@pytest.mark.slow
def test_every_answer_is_that_of_the_same_truncation_in_memory(shown: dict[str, Any]) -> None:
    assert shown["summary"]["turns"] == len(shown["turns"]) >= 8
    assert shown["summary"]["all_identical"] is True


@pytest.mark.slow
def test_the_window_overflows_several_times_and_all_that_stays_is_reused(shown: dict[str, Any]) -> None:
    turns = shown["turns"]
    after_kill = next(at for at, turn in enumerate(turns) if turn["after_kill"])

    assert shown["summary"]["overflows"] == sum(turn["dropped_tokens"] > 0 for turn in turns) >= 3
    assert any(turn["dropped_tokens"] for turn in turns[:after_kill])
    assert any(turn["dropped_tokens"] for turn in turns[after_kill:])
    for turn in turns:
        assert turn["reused_tokens"] == turn["history_tokens"]
        assert turn["history_tokens"] + turn["new_tokens"] + 32 <= 1024


@pytest.mark.parametrize("options", [["--overflow", "--window", "0"], ["--window", "512"]], ids="empty without".split())
def test_a_window_that_means_nothing_is_refused(options: list[str], tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "examples.demo", *options],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )

    assert done.returncode == 2
    assert "--window" in done.stderr
