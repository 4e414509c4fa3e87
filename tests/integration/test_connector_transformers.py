"""The transformers connector with a real daemon: over its death and return, an engine only ever recomputes."""

from __future__ import annotations

from collections.abc import Callable

import torch

from kvservice_client import Client, Durability
from tests.daemon import DaemonProcess
from tests.unit.connector_models import BLOCK_TOKENS, computed, connector, prompt, states, tiny_llama


def test_a_history_survives_the_daemon_and_its_absence_only_costs_time(
    new_daemon: Callable[..., DaemonProcess],
) -> None:
    daemon, model, tokens = new_daemon(), tiny_llama(), prompt(6 * BLOCK_TOKENS + 1)
    cache = computed(model, tokens)
    with Client(daemon.address, timeout_s=2.0) as client:
        subject = connector(client, model)
        first = subject.save(tokens[:, : 2 * BLOCK_TOKENS], cache)
        second = subject.save(tokens, cache)
        assert (first.stored, second.stored, second.already_stored) == (2, 4, 2)

        daemon.kill()
        away = subject.restore(tokens)
        assert (away.tokens, away.tier, subject.save(tokens, cache).stored) == (0, "none", 0)
        assert away.error is not None

        daemon.start()
        back = subject.restore(tokens)
        assert (back.tokens, back.tier, back.error) == (6 * BLOCK_TOKENS, "dram", None)
        for before, after in zip(states(cache), states(back.cache), strict=True):
            assert torch.equal(before[0][:, :, : back.tokens], after[0])
            assert torch.equal(before[1][:, :, : back.tokens], after[1])


def test_the_tier_that_served_is_named(daemon: DaemonProcess) -> None:
    model, tokens = tiny_llama(), prompt(4 * BLOCK_TOKENS + 1)
    with Client(daemon.address) as client:
        subject = connector(client, model)
        subject.save(tokens, computed(model, tokens), Durability.SSD)
        keys = [block.key for block in client.admin.list_blocks(layout_fingerprint=subject.layout.fingerprint)]
        assert subject.restore(tokens).tier == "dram"

        client.evict(keys[:1], "dram")
        assert subject.restore(tokens).tier == "mixed"
        client.evict(keys, "dram")
        assert subject.restore(tokens).tier == "ssd"
