"""The demo: a real daemon, and a SIGKILL in the middle. It must show the promises.

With a tiny model as far as needed, and in one slow test as users run it: with a real model, to its end.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from examples.demo import report
from examples.demo.conversation import hold_conversation
from examples.demo.script import CHAPTERS, KILL_AFTER, TURNS, opening

_SHARED_MEMORY = Path("/dev/shm")
_LEFT_BEHIND = "kvservice-demo-*"
_TINY, _WHOLE = "a tiny model, as far as after the kill", "whole"
_BYTES_PER_TOKEN = {  # K and V, layers, heads, dims, fp32.
    _TINY: 2 * 4 * 4 * 32 * 4,
    _WHOLE: 2 * 30 * 3 * 64 * 4,  # SmolLM2-135M.
}


def run_demo(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs with `folder` as its temporary directory. Its processes end with this call, also if it fails."""
    with subprocess.Popen(
        [sys.executable, "-m", "examples.demo", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(folder), **environment},
    ) as demo:
        try:
            output, errors = demo.communicate(timeout=900)
        except BaseException:
            demo.kill()
            raise
    assert not list(folder.glob(_LEFT_BEHIND))
    assert not list(_SHARED_MEMORY.glob(f"kvservice-demo-{demo.pid}-*"))
    return subprocess.CompletedProcess(demo.args, demo.returncode, output, errors)


def tiny_model(folder: Path) -> None:
    """A model with random weights, which knows the words of the demo's book."""
    text = " ".join([*CHAPTERS, *TURNS, *(str(message) for message in opening())])
    words = dict.fromkeys(["<unknown>", *re.findall(r"\w+|[^\w\s]+", text)])
    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unknown>"))
    tokenizer.pre_tokenizer = Whitespace()
    template = "{% for message in messages %}{{ message.role }}: {{ message.content }} {% endfor %}"
    template += "{% if add_generation_prompt %}assistant: {% endif %}"
    fast: Any = PreTrainedTokenizerFast
    fast(tokenizer_object=tokenizer, chat_template=template).save_pretrained(folder)
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=128, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=8192, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model: Any = LlamaForCausalLM(config)
    model.save_pretrained(folder)


def first_turns(folder: Path, model: Path, count: int) -> dict[str, Any]:
    """The output of the program for so many turns."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(folder))
        patch.setenv("OMP_NUM_THREADS", "1")  # Another test runs on the other core.
        turns: Any = hold_conversation(str(model), log=print, always_load=True)
        with closing(turns):  # That ends the processes of this generator.
            return report.as_object(list(islice(turns, count)), overflow=False)


# The turns up to the one after the kill show all promises except two.
@pytest.fixture(scope="module", params=[_TINY, pytest.param(_WHOLE, marks=pytest.mark.slow)])
def shown(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The demo's JSON object. The program writes nothing else to standard output."""
    folder = tmp_path_factory.mktemp("demo")
    if request.param == _TINY:
        tiny_model(folder / "model")
        return first_turns(folder, folder / "model", KILL_AFTER + 1) | {"bytes_per_token": _BYTES_PER_TOKEN[_TINY]}
    done = run_demo(folder, "--json")
    assert done.returncode == 0, done.stderr
    shown: dict[str, Any] = json.loads(done.stdout)
    return shown | {"bytes_per_token": _BYTES_PER_TOKEN[_WHOLE]}


@pytest.mark.parametrize("shown", [pytest.param(_WHOLE, marks=pytest.mark.slow)], indirect=True)
def test_the_conversation_is_as_long_as_a_real_one(shown: dict[str, Any]) -> None:
    turns = shown["turns"]

    assert shown["summary"]["turns"] == len(turns) >= 8
    assert turns[-1]["history_tokens"] >= 2000
    assert min(turn["new_tokens"] for turn in turns) >= 30
    assert min(turn["answer_tokens"] for turn in turns) >= 24


def test_every_answer_is_the_one_of_plain_transformers(shown: dict[str, Any]) -> None:
    assert all(turn["identical"] is True for turn in shown["turns"])
    assert shown["summary"]["all_identical"] is True


def test_the_history_is_reused_at_every_turn_the_last_partial_block_too(shown: dict[str, Any]) -> None:
    assert shown["summary"]["block_tokens"] == 256
    assert any(turn["history_tokens"] >= 256 for turn in shown["turns"])
    for turn in shown["turns"]:
        if turn["history_tokens"] >= 256:
            assert 0.95 * turn["history_tokens"] <= turn["reused_tokens"] <= turn["history_tokens"], turn
        assert turn["bytes"] == turn["reused_tokens"] * shown["bytes_per_token"]


def test_both_tiers_serve_and_dram_survives_the_kill(shown: dict[str, Any]) -> None:
    tiers = [turn["tier"] for turn in shown["turns"]]
    [after_kill] = [turn for turn in shown["turns"] if turn["after_kill"]]

    assert tiers[0] == "none"
    assert {turn["transport"] for turn in shown["turns"] if turn["reused_tokens"]} == {"shm"}
    assert tiers.count("ssd") >= (2 if len(tiers) >= 8 else 1)
    assert after_kill["tier"] == "dram"


@pytest.mark.parametrize("shown", [pytest.param(_WHOLE, marks=pytest.mark.slow)], indirect=True)
def test_the_first_token_of_the_last_turn_comes_in_a_fraction_of_the_time(shown: dict[str, Any]) -> None:
    last = shown["turns"][-1]

    assert shown["summary"]["ttft_ratio_last"] == pytest.approx(last["ttft_reuse_s"] / last["ttft_recompute_s"])
    assert shown["summary"]["ttft_ratio_last"] <= 0.15  # 0.04 where nothing else runs.


def test_a_model_that_is_not_there_is_said_so(tmp_path: Path) -> None:
    done = run_demo(tmp_path, "--json", "--model", "unknown/missing", HF_HUB_OFFLINE="1")

    assert (done.returncode, done.stdout) == (1, "")
    assert "unknown/missing" in done.stderr
    assert "Traceback" not in done.stderr
