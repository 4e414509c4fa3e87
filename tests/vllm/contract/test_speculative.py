"""Speculative decoding under vLLM's real scheduler: tokens are drafted, from all right to all wrong."""

from __future__ import annotations

import pytest

from kvservice_client import Client
from tests.daemon import DaemonProcess, until
from tests.vllm.contract.steps import Steps
from tests.vllm.contract.test_scheduler import (
    BLOCK,
    client,
    daemon,
    expect_nothing_is_held,
    expect_right_numbers,
    ours,
    tokens,
)
from tests.vllm.contract.worker import Runner

__all__ = ["client", "daemon", "tokens"]


@pytest.mark.parametrize(
    ("drafted", "generated"),
    [(1, 3 * BLOCK + 1), (3, 3 * BLOCK), pytest.param(3, 3 * BLOCK + 6, marks=pytest.mark.fast)],
)
@pytest.mark.parametrize("runner", Runner)
def test_with_speculative_decoding_only_accepted_tokens_are_stored(
    daemon: DaemonProcess, client: Client, runner: Runner, drafted: int, generated: int, tokens: list[int]
) -> None:
    """The KV of drafts that were not accepted is in the pages, at the places of tokens to come."""
    with Steps(ours(daemon, "layers", drafted=drafted), runner) as steps:
        request = steps.ask(tokens, generated)
        steps.expect(request.request_id)
        steps.forget_pages()
        # Where the last draft was accepted, the answer's last token is computed too.
        computed = [*tokens, *request.output_token_ids][: request.num_computed_tokens]
        until(lambda: expect_right_numbers(client, steps, computed, with_partial=True) == len(computed))
        again = steps.ask([*computed, 7], BLOCK)
        steps.expect(again.request_id)
        assert steps.hits[again.request_id] == len(computed)
        assert not steps.bad_pages
        expect_nothing_is_held(client, steps)
