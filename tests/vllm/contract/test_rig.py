"""The rig itself, with a connector of a few lines: right bytes pass, and wrong ones are found."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.vllm.contract.page_keeper import PageKeeper
from tests.vllm.contract.setup import Setup
from tests.vllm.contract.steps import Steps
from tests.vllm.contract.worker import Runner

pytestmark = pytest.mark.fast

PROMPT = [7 * place % 991 for place in range(200)]


@pytest.fixture(autouse=True)
def _empty_store() -> Iterator[None]:
    PageKeeper.store.clear()
    yield
    PageKeeper.store.clear()


def keeper(**options: Any) -> Setup:
    return Setup("PageKeeper", "tests.vllm.contract.page_keeper", options)


@pytest.mark.parametrize("between_steps", [False, True])
@pytest.mark.parametrize("runner", Runner)
def test_pages_of_a_connector_give_the_tokens_of_a_computation(runner: Runner, between_steps: bool) -> None:
    with Steps(keeper(between_steps=between_steps), runner) as steps:
        steps.expect(steps.ask(PROMPT, 40).request_id)
        steps.forget_pages()
        again = steps.ask(PROMPT, 40)
        steps.expect(again.request_id)
        assert steps.hits[again.request_id] == 192
        steps.expect_nothing_is_held()


def test_a_loaded_page_with_another_ones_numbers_is_found() -> None:
    with Steps(keeper(swaps=True)) as steps:
        steps.ask(PROMPT)
        steps.forget_pages()
        with pytest.raises(AssertionError, match="not reported as bad"):
            steps.ask(PROMPT)


def test_pages_that_are_never_freed_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.vllm.contract.steps._WAIT_S", 0.5)
    with Steps(keeper(holds=True)) as steps:
        steps.ask(PROMPT)
        with pytest.raises(AssertionError):
            steps.expect_nothing_is_held()
