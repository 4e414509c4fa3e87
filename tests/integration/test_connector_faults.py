"""With every fault of the daemon, at any time, a generation has the tokens of the model without a connector."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers.generation.streamers import BaseStreamer

from kvservice_adapter.connectors.transformers import TransformersConnector
from kvservice_adapter.connectors.transformers.cache import StoredCache
from kvservice_adapter.connectors.transformers.history import LoadedHistory
from kvservice_api.errors import ChecksumMismatch
from kvservice_api.v1 import admin_pb2 as pb
from kvservice_api.v1 import blocks_pb2
from tests.daemon import DaemonProcess, until
from tests.integration.media import arena
from tests.unit.connector_models import computed, connector, prompt, states, tiny_llama

_TOKENS = 34
_WAIT_S = 0.25
_SLACK_S = 0.5  # A busy machine may add this to a bounded wait.
_HITS_AGAIN_S = 5.0
_ASK: dict[str, Any] = {"do_sample": False, "max_new_tokens": 24, "min_new_tokens": 24, "pad_token_id": 0}


class AtToken(BaseStreamer):
    """Calls a function once the model has generated so many new tokens."""

    def __init__(self, new_tokens: int, act: Callable[[], object]) -> None:
        self._calls_left, self._act = new_tokens + 1, act  # The prompt comes first.

    def put(self, value: torch.Tensor) -> None:
        self._calls_left -= 1
        if not self._calls_left:
            self._act()

    def end(self) -> None:
        pass


def stop(daemon: DaemonProcess) -> None:
    daemon.process.send_signal(signal.SIGSTOP)


def back(daemon: DaemonProcess) -> None:
    """The daemon serves again."""
    if daemon.process.poll() is not None:
        daemon.start()
    daemon.process.send_signal(signal.SIGCONT)


def restart(daemon: DaemonProcess) -> None:
    daemon.kill()
    daemon.start()


def answer(model: Any, ids: torch.Tensor, cache: Any = None, **more: Any) -> list[int]:
    output = model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, **_ASK, **more)
    tokens: list[int] = output[0].tolist()
    return tokens


def history_of(cache: Any) -> LoadedHistory:
    assert isinstance(cache, StoredCache) and isinstance(cache.history, LoadedHistory)
    return cache.history


def hits_again(subject: TransformersConnector, ids: torch.Tensor) -> None:
    until(lambda: subject.restore(ids).tokens > 0, timeout_s=_HITS_AGAIN_S)


_FAULTS = {"killed": DaemonProcess.kill, "stopped": stop, "restarted": restart}
_MOMENTS = ("before", "between", "prefilled", "decoding", "ended")
_EACH = [(moment, fault, transport) for moment in _MOMENTS for fault in _FAULTS for transport in ("shm", "grpc")]
_FAST = {("between", "killed", "grpc"), ("prefilled", "stopped", "shm"), ("decoding", "restarted", "grpc")}


@pytest.mark.parametrize(
    ("moment", "fault", "transport"),
    [pytest.param(*each, marks=() if each in _FAST else pytest.mark.slow) for each in _EACH],
)
def test_a_daemon_that_fails_costs_no_token_and_no_more_than_the_bound(
    new_daemon: Callable[..., DaemonProcess], moment: str, fault: str, transport: str
) -> None:
    daemon, model, ids = new_daemon(), tiny_llama(num_hidden_layers=6), prompt(_TOKENS)
    expected = answer(model, ids)
    with daemon.client(transport=transport) as client:
        subject = connector(client, model, wait_s=_WAIT_S)
        subject.save(ids, computed(model, ids), wait_s=30.0)
        assert subject.restore(ids).tokens == 33

        if moment == "before":
            _FAULTS[fault](daemon)
        began_s = time.monotonic()
        history = subject.restore(ids)
        assert moment != "before" or time.monotonic() - began_s <= _WAIT_S + _SLACK_S
        if moment == "between":
            _FAULTS[fault](daemon)
        at = {"prefilled": 1, "decoding": 9}.get(moment)
        streamer = AtToken(at, lambda: _FAULTS[fault](daemon)) if at is not None else None
        assert answer(model, ids, history.cache, streamer=streamer) == expected
        if moment == "ended":
            _FAULTS[fault](daemon)
        if history.tokens:
            waited_s = sum(sum(loader.report.waited_s) for loader in history_of(history.cache).loaders)
            assert waited_s <= _WAIT_S + _SLACK_S
        subject.save(torch.tensor(expected), history.cache, wait_s=0.0)

        back(daemon)
        hits_again(subject, ids)
        assert answer(model, ids, subject.restore(ids).cache) == expected


def test_layers_that_come_too_late_are_computed_within_the_bound(daemon: DaemonProcess) -> None:
    model, ids = tiny_llama(num_hidden_layers=6), prompt(_TOKENS)
    with daemon.client() as client, daemon.client(throttle_bytes_per_s=20_000.0) as slow_client:
        connector(client, model).save(ids, computed(model, ids), wait_s=30.0)
        late = connector(slow_client, model, wait_s=0.1)

        while (history := late.restore(ids)).tokens != 33:  # On a busy machine the lookup can be late, too.
            assert history.not_found is not None
        assert answer(model, ids, history.cache) == answer(model, ids)
        assert history.error is not None
        assert sum(history_of(history.cache).loaders[0].report.waited_s) <= 0.1 + _SLACK_S


def test_a_layer_that_fails_its_checksum_is_computed_and_its_block_is_dropped(
    new_daemon: Callable[..., DaemonProcess],
) -> None:
    daemon, model, ids = new_daemon(), tiny_llama(num_hidden_layers=6), prompt(_TOKENS)
    with daemon.client() as client:
        subject = connector(client, model)
        subject.save(ids, computed(model, ids), wait_s=30.0)
        keys = states(computed(model, ids))[3][0]
        medium = arena(daemon)
        medium.flip(medium.find(keys[0, 0, 4:8].numpy().tobytes()) + 17, bit=3)

        history = subject.restore(ids)
        assert answer(model, ids, history.cache) == answer(model, ids)
        assert isinstance(history.error, ChecksumMismatch)
        until(lambda: subject.restore(ids).tokens == 4)  # The blocks before it.


def test_a_request_is_explained_with_its_plan_and_what_it_took(new_daemon: Callable[..., DaemonProcess]) -> None:
    daemon, model, ids = new_daemon(), tiny_llama(), prompt(_TOKENS)
    with daemon.client(transport="shm") as client:
        subject = connector(client, model)
        subject.save(ids, computed(model, ids), wait_s=30.0)
        answer(model, ids, subject.restore(ids, request_id="asked").cache)

        until(lambda: len(client.admin.explain_request("asked").reports) > 0)
        report = client.admin.explain_request("asked").reports[0].report
        assert (report.plan, report.outcome) == (blocks_pb2.REQUEST_PLAN_LOAD, blocks_pb2.REQUEST_OUTCOME_DONE)
        assert (report.history_tokens, report.loaded_tokens, report.tier, report.transport) == (33, 33, "dram", "shm")
        assert report.loaded_bytes == 34 * subject.layout.bytes_per_token, "a block is loaded whole"
        assert 0 < report.times.first_layer_ms <= report.times.load_ms


@pytest.mark.parametrize(
    ("other", "field"),
    [
        ({"num_hidden_layers": 5}, "layers"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "rotary.base"),
        ({"num_key_value_heads": 6}, "kv_heads"),
        ({"dtype": torch.bfloat16}, "dtype"),
    ],
)
def test_what_another_model_has_stored_is_never_used(daemon: DaemonProcess, other: dict[str, Any], field: str) -> None:
    ids = prompt(_TOKENS)
    one, another = tiny_llama(num_hidden_layers=6), tiny_llama(**{"num_hidden_layers": 6, **other})
    with daemon.client() as client:
        subject = connector(client, one, model_revision="other")
        subject.save(ids, computed(one, ids), session_id="other", wait_s=30.0)
        assert subject.restore(ids, session_id="other").tokens == 33

        name = f"other {field}"
        missed = connector(client, another, model_revision="other").restore(ids, session_id="other", request_id=name)
        assert (missed.tokens, missed.error) == (0, None)
        [lookup] = client.admin.explain_request(name).lookups
        assert lookup.miss.reason == pb.MISS_REASON_OTHER_LAYOUT
        stored = next(each for each in lookup.other_layouts if each.layout_fingerprint == subject.layout.fingerprint)
        assert field in [each.field for each in stored.differences]
        assert answer(another, ids, missed.cache) == answer(another, ids)
