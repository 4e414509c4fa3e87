"""The engine of the demo: a process that answers one turn at a time, and keeps no KV between turns.

It reads one JSON object per line from standard input, and writes one per line to standard output:
first a `Loaded`, then a reply for each request.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple, TextIO

import torch

from examples.demo.generation import generate
from examples.demo.model import LoadedModel, ModelNotFound, load_model
from examples.demo.protocol import BLOCK_TOKENS, Loaded, Turn
from examples.demo.script import Message, assistant
from examples.demo.windowed import EngineInMemory, OnlyLoads, WindowedEngine
from kvservice_adapter.connectors.transformers import Restored, Saved, TransformersConnector, UnsupportedModel
from kvservice_adapter.rope import UnsupportedRotation
from kvservice_api.image import block_geometry
from kvservice_api.layout import Shard
from kvservice_client import Client


class _Run(NamedTuple):
    prompt: torch.Tensor
    output: list[int]  # Prompt and answer.
    ttft_s: float
    history: Restored | None


class Engine:
    def __init__(self, loaded: LoadedModel, connector: TransformersConnector, client: Client) -> None:
        """`client` is the client of the connector."""
        self._model, self._tokenizer = loaded.model, loaded.tokenizer
        self._connector = connector
        self._client = client

    def warm_up(self) -> None:
        """Run the one-time initialisation of the libraries, so that no turn includes it."""
        self._model.generate(torch.arange(1, 65)[None], max_new_tokens=2)

    def answer(self, messages: Sequence[Message], *, session_id: str, compare: bool) -> Turn:
        """Answer the last message; with `compare`, first without KVService and then with it."""
        recomputed = self._run(messages) if compare else None
        before_run = self._client.stats().loaded_bytes
        run = self._run(messages, session_id)
        loaded = self._client.stats().loaded_bytes
        transports = [name for name, size_bytes in loaded.items() if size_bytes > before_run.get(name, 0)]
        assert run.history is not None
        prompt_tokens = run.prompt.shape[1]
        answer_ids = run.output[prompt_tokens:]
        text = self._tokenizer.decode(answer_ids, skip_special_tokens=True).strip()
        saved = self._save([*messages, assistant(text)], run, session_id)
        before = any(message["role"] == "assistant" for message in messages)
        history_tokens = _common(self._ids(messages[:-1], to_answer=False)[0], run.prompt[0]) if before else 0
        error = run.history.error or saved.error
        return Turn(
            answer=text,
            answer_tokens=len(answer_ids),
            history_tokens=history_tokens,
            new_tokens=prompt_tokens - history_tokens,
            reused_tokens=run.history.loaded_tokens,
            tier=run.history.tier,
            transport="+".join(sorted(transports)) or "none",
            bytes=run.history.size_bytes if run.history.loaded_tokens else 0,
            ttft_reuse_s=run.ttft_s,
            ttft_recompute_s=recomputed.ttft_s if recomputed else None,
            identical=recomputed.output == run.output if recomputed else None,
            problem=f"{type(error).__name__}: {error}" if error else "",
        )

    def count_tokens(self, messages: Sequence[Message]) -> int:
        return self._ids(messages, to_answer=False).shape[1]

    def _run(self, messages: Sequence[Message], session_id: str = "") -> _Run:
        """Generate an answer. Without a session no KV is reused."""
        began_s = time.perf_counter()
        prompt = self._ids(messages, to_answer=True)
        history = self._connector.restore(prompt, session_id=session_id) if session_id else None
        answered = generate(self._model, prompt, history.cache if history else None)
        return _Run(prompt, answered.token_ids, answered.first_token_at_s - began_s, history)

    def _save(self, messages: Sequence[Message], run: _Run, session_id: str) -> Saved:
        """Save the KV of the tokens with which the next turn's prompt begins.

        The cache differs from that: the model never read the answer's last tokens, and the tokenizer
        may split the answer's text into other tokens than the model chose.
        """
        assert run.history is not None
        cache = run.history.cache
        history = self._ids(messages, to_answer=False)
        known = min(_common(history[0], run.output), cache.get_seq_length())
        cache.crop(known - cache.get_seq_length())
        if known < history.shape[1]:
            with torch.inference_mode():
                self._model(history[:, known:], past_key_values=cache, logits_to_keep=1)
        return self._connector.save(history, cache, session_id=session_id)

    def _ids(self, messages: Sequence[Message], *, to_answer: bool) -> torch.Tensor:
        text = self._tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=to_answer)
        ids: torch.Tensor = self._tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
        return ids


def _common(first: Iterable[Any], second: Iterable[Any]) -> int:
    """The number of leading tokens that two sequences share."""
    count = 0
    for one, other in zip(first, second, strict=False):
        if int(one) != int(other):
            break
        count += 1
    return count


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--address", required=True)
    parser.add_argument("--model", default="")
    parser.add_argument(
        "--wait-s", type=float, help="seconds to wait for the daemon per call; the engine then loads all stored KV"
    )
    arguments = parser.parse_args()
    wait_s = arguments.wait_s

    # A library's output on stdout must not mix with the lines of the protocol.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    warnings.filterwarnings("ignore")
    try:
        loaded = load_model(arguments.model)
        with Client(arguments.address, name="demo engine") as client:
            connector = TransformersConnector(
                client,
                loaded.model,
                model_id=loaded.model_id,
                model_revision=loaded.model_revision,
                block_tokens=BLOCK_TOKENS,
                **({} if wait_s is None else {"wait_s": wait_s, "save_wait_s": wait_s, "rates": OnlyLoads()}),
            )
            engine = Engine(loaded, connector, client)
            _serve(engine, WindowedEngine(loaded, connector, client), loaded, connector, answers)
    except (ModelNotFound, UnsupportedModel, UnsupportedRotation, OSError) as error:
        print(f"the engine cannot work: {error}", file=sys.stderr)
        return 1
    return 0


def _serve(
    engine: Engine,
    windowed: WindowedEngine,
    loaded: LoadedModel,
    connector: TransformersConnector,
    answers: TextIO,
) -> None:
    engine.warm_up()
    layout = connector.layout
    geometry = block_geometry(layout, Shard.whole(layout), layout.block_tokens)
    context_tokens = getattr(loaded.model.config, "max_position_embeddings", 0)
    loaded_line = Loaded(loaded.model_id, geometry.image_bytes, context_tokens)
    print(json.dumps(asdict(loaded_line)), file=answers)
    in_memory: EngineInMemory | None = None
    for line in sys.stdin:
        request = json.loads(line)
        if "count" in request:
            reply: Any = [engine.count_tokens(messages) for messages in request["count"]]
        elif "state" in request:
            reply = asdict(windowed.answer(**request))
        elif "window" in request:
            in_memory = in_memory or EngineInMemory(loaded)
            reply = asdict(in_memory.answer(**request))
        else:
            turn = engine.answer(request["messages"], session_id=request["session_id"], compare=request["compare"])
            reply = asdict(turn)
        print(json.dumps(reply), file=answers)


if __name__ == "__main__":
    sys.exit(main())
