"""The transformers connector's queue of prompts, with a real daemon and histories on SSD."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from kvservice_adapter.connectors.transformers import PromptQueue
from kvservice_api.errors import InvalidRequest
from kvservice_client import Client, Durability, ReadyState
from tests.clock import ClientClock
from tests.daemon import MIB, DaemonProcess, until
from tests.unit.connector_models import BLOCK_TOKENS, computed, connector, tiny_llama

NewDaemon = Callable[..., DaemonProcess]


def prompt_of(seed: int) -> torch.Tensor:
    return torch.randint(0, 97, (1, 60 * BLOCK_TOKENS + 1), generator=torch.Generator().manual_seed(seed))


def taken(queue: PromptQueue, count: int) -> list[str]:
    return [prompt.request_id for prompt in queue.take(count)]


def test_prompts_whose_history_is_in_dram_come_first_and_late_ones_before_them(new_daemon: NewDaemon) -> None:
    daemon = new_daemon(
        dram__capacity_bytes=8 * MIB, index__volatile_map_bytes=MIB, ssd__capacity_bytes=64 * MIB, hints__dram_share=0.1
    )
    model, clock = tiny_llama(), ClientClock()
    with Client(daemon.address, timeout_s=30.0) as waiting, daemon.client(clock=clock) as client:
        subject = connector(waiting, model)
        for number in range(8):
            tokens = prompt_of(number)
            saved = subject.save(
                tokens, computed(model, tokens), Durability.SSD, session_id=f"chat-{number}", wait_s=60
            )
            assert saved.error is None
            keys = [block.key for block in waiting.admin.list_blocks(layout_fingerprint=subject.layout.fingerprint)]
            waiting.evict(keys, "dram")

        queue, hints = connector(client, model).queue(patience_s=5.0), client.hints()
        for number in range(8):  # Some by their session, some by their tokens alone.
            queue.add(f"request-{number}", prompt_of(number), session_id=f"chat-{number}" if number % 2 else "")
        queue.add("new", prompt_of(100))
        queue.add("short", prompt_of(101)[:, :2])

        until(lambda: hints.readiness("new").state is ReadyState.ABSENT)
        until(lambda: hints.readiness("request-0").state is ReadyState.IN_DRAM)
        until(lambda: hints.readiness("request-7").state is ReadyState.ON_SSD)
        first = taken(queue, 8)
        assert first[0] == "request-0"
        assert first[-2:] == ["new", "short"]
        assert not {"request-6", "request-7"} & set(first)

        clock.advance(seconds=6.0)  # All that are left have waited too long.
        assert taken(queue, 2) == [f"request-{number}" for number in range(8) if f"request-{number}" not in first][:2]
        assert queue.remove("request-7")
        assert not queue.remove("request-7")
        queue.take(10)
        assert len(queue) == 0
        until(lambda: client.admin.status().queued_requests == 0)


def test_the_order_is_that_of_arrival_while_the_daemon_is_away(new_daemon: NewDaemon) -> None:
    daemon, model = new_daemon(), tiny_llama()
    with daemon.client() as client:
        queue = connector(client, model).queue()
        daemon.kill()
        for number in range(4):
            queue.add(f"request-{number}", prompt_of(number))
        assert taken(queue, 3) == ["request-0", "request-1", "request-2"]
        assert taken(queue, 3) == ["request-3"]
        assert taken(queue, 3) == []


@pytest.mark.parametrize(
    "wrong",
    [
        lambda queue: queue.add("one", prompt_of(1)),
        lambda queue: queue.add("", prompt_of(1)),
        lambda queue: queue.add("two", [-1] * 10),
        lambda queue: queue.add("two", prompt_of(1), session_id="not valid"),
    ],
)
def test_a_wrong_prompt_raises_at_once_and_is_not_queued(daemon: DaemonProcess, wrong: Callable[[Any], None]) -> None:
    with daemon.client() as client:
        queue = connector(client, tiny_llama()).queue()
        queue.add("one", prompt_of(1))
        with pytest.raises(InvalidRequest):
            wrong(queue)
        assert taken(queue, 5) == ["one"]
