"""The two engines, each with its connector. vLLM is imported where it is started."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from benchmarks.adapter import rig
from benchmarks.queue.conversations import ANSWER_TOKENS, Prompt, Served, Size, Way
from examples.models import LoadedModel
from kvservice_adapter.connectors.transformers import TransformersConnector
from kvservice_adapter.rates import Rates
from kvservice_api.errors import SessionNotFound
from kvservice_client import Client, Durability, Layout, Session
from tests.daemon import DaemonProcess, until
from tests.vllm.request_reports import report_of

REVISION = "benchmark"
_WAIT_S = 60.0  # No wait may end by a timeout here.
_PAGE_TOKENS = 128
_PAGED_CONVERSATIONS = 3  # So many fit into vLLM's own pages.
_RUNNING_MAX = 2


class TransformersEngine:
    """One request at a time, from the connector's queue of prompts."""

    name = "transformers"

    def __init__(self, loaded: LoadedModel, daemon: DaemonProcess) -> None:
        self._loaded, self._daemon = loaded, daemon
        self._rates = Rates()  # Measured by all runs.
        self.connect()
        self.layout = self._connector.layout

    def connect(self) -> None:
        self._client = self._daemon.client("engine", timeout_s=_WAIT_S)
        self._connector = TransformersConnector(
            self._client,
            self._loaded.model,
            model_id=self._loaded.model_id,
            model_revision=REVISION,
            wait_s=_WAIT_S,
            rates=self._rates,
        )

    def disconnect(self) -> None:
        self._connector.close()
        self._client.close()

    def store(self, session_id: str, token_ids: list[int]) -> None:
        tokens = torch.tensor([token_ids])
        cache = self._connector.restore(tokens).cache
        rig.forward(self._loaded.model, tokens, cache)
        saved = self._connector.save(tokens, cache, Durability.SSD, session_id=session_id, wait_s=_WAIT_S)
        assert saved.error is None and not saved.refused, saved

    def serve(self, prompts: Sequence[Prompt], way: Way) -> list[Served]:
        begin_s, found = time.monotonic(), dict[str, Served]()
        if not way.policy:
            for prompt in prompts:
                found[prompt.name] = self._answer(prompt, DynamicCache(config=self._loaded.model.config), begin_s)
            return [found[prompt.name] for prompt in prompts]
        queue = self._connector.queue(patience_s=_WAIT_S if way.ready_first else 0.0)
        for prompt in prompts:
            queue.add(prompt.name, prompt.token_ids, session_id=prompt.session_id)
        by_name = {prompt.name: prompt for prompt in prompts}
        while taken := queue.take(1):
            prompt = by_name[taken[0].request_id]
            restored = self._connector.restore(prompt.token_ids, session_id=prompt.session_id, request_id=prompt.name)
            served = found[prompt.name] = self._answer(prompt, restored.cache, begin_s)
            tokens = prompt.token_ids + served.answer[:-1]
            self._connector.save(tokens, restored.cache, session_id=prompt.session_id, wait_s=0.0)
            assert restored.error is None, restored.error
        assert self._connector.flush(_WAIT_S)
        return [_reported(self._client, prompt.name, found[prompt.name]) for prompt in prompts]

    def _answer(self, prompt: Prompt, cache: Any, begin_s: float) -> Served:
        tokens = torch.tensor([prompt.token_ids])[:, cache.get_seq_length() :]
        answer: list[int] = []
        ttft_s = 0.0
        for _ in range(ANSWER_TOKENS):
            answer.append(int(rig.forward(self._loaded.model, tokens, cache).argmax()))
            ttft_s = ttft_s or time.monotonic() - begin_s
            tokens = torch.tensor([answer[-1:]])
        return Served(ttft_s, answer)


class VllmEngine:
    """vLLM's scheduler, with pages of its own for three conversations."""

    name = "vllm"

    def __init__(self, vllm: Any, layout: Layout, client: Client) -> None:
        """`vllm` is a `tests.vllm.engine.Engine`."""
        self._vllm, self.layout, self._client = vllm, layout, client
        self._probe: list[int] = list(range(layout.block_tokens + 1))

    def connect(self) -> None:
        """A connector that has lost its daemon asks it again in the background."""
        until(lambda: self._vllm.answer([*self._probe, 1], 1, may_save=False).cached_tokens > 0)

    def disconnect(self) -> None:
        """Its connector notices."""

    def store(self, session_id: str, token_ids: list[int]) -> None:
        for tokens, name in ((token_ids, session_id), (self._probe, "probe")):
            session = self._client.session(self.layout, name)
            if not _is_named(session, tokens):
                self._vllm.answer(tokens, 1, session_id=name)
            until(partial(_is_named, session, tokens))

    def serve(self, prompts: Sequence[Prompt], way: Way) -> list[Served]:
        kept = [
            {"session_id": prompt.session_id} if way.policy else {"may_load": False, "may_save": False}
            for prompt in prompts
        ]
        answers = self._vllm.answers([prompt.token_ids for prompt in prompts], ANSWER_TOKENS, kept)
        served = [Served(each.first_token_s, each.token_ids) for each in answers]
        if not way.policy:
            return served
        ids = [each.request_id for each in answers]
        return [_reported(self._client, name, each) for name, each in zip(ids, served, strict=True)]


def _reported(client: Client, request_id: str, served: Served) -> Served:
    """With what the connector has reported of the load."""
    report = report_of(client, request_id)
    return served._replace(tier=report.tier, load_s=report.times.load_ms / 1e3)


def _is_named(session: Session, tokens: list[int]) -> bool:
    try:
        return session.get().token_count == len(tokens)
    except SessionNotFound:
        return False


@contextmanager
def transformers_engine(daemon: DaemonProcess, loaded: LoadedModel) -> Iterator[TransformersEngine]:
    with rig.a_core_for_loading():
        engine = TransformersEngine(loaded, daemon)
        yield engine
        engine.disconnect()


@contextmanager
def vllm_engine(daemon: DaemonProcess, model: Path, size: Size, client: Client) -> Iterator[VllmEngine]:
    from tests.vllm.engine import engine, model_layout, transfer_config

    layout = model_layout(revision=REVISION)
    patient = {"lookup_wait_s": 1.0, "wait_s": 5.0}  # The machine may be busy.
    transfer = transfer_config(address=daemon.address, model_id=layout.model_id, model_revision=REVISION, **patient)
    pages = -(-(size.conversation_tokens + 1) // _PAGE_TOKENS)  # Of one conversation.
    options = {
        "block_size": _PAGE_TOKENS,
        "max_model_len": pages * _PAGE_TOKENS,
        "max_num_seqs": _RUNNING_MAX,
        "num_gpu_blocks_override": 1 + _PAGED_CONVERSATIONS * pages,  # vLLM has a null page.
    }
    with engine(model, transfer, **options) as vllm:
        yield VllmEngine(vllm, layout, client)
