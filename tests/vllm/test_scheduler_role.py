"""The scheduler's role on a real daemon: generations of keys, and short histories. No model runs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import pytest

from benchmarks.vllm.roles import Roles
from tests.daemon import MIB, DaemonProcess, until
from tests.vllm.engine import model_folder

pytestmark = pytest.mark.fast

PROMPT = list(range(256 + 40))
_names = (f"request-{number}" for number in itertools.count())


@pytest.fixture
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    with DaemonProcess(tmp_path_factory.mktemp("store"), dram__capacity_bytes=256 * MIB) as daemon:
        yield daemon


def started(daemon: DaemonProcess) -> Roles:
    roles = Roles(model_folder(), daemon.address, pages=8, lookup_wait_s=30.0)
    until(lambda: roles.scheduler.is_ready)
    return roles


def found(roles: Roles, prompt: Sequence[int] = PROMPT) -> int:
    """How many tokens of a request vLLM would load."""
    request = roles.request(next(_names), prompt)
    roles.scheduler.on_new(request)
    tokens: list[int | None] = []

    def is_answered() -> bool:
        tokens.append(roles.scheduler.matched_tokens(request, 0)[0])
        return tokens[-1] is not None

    until(is_answered)
    roles.scheduler.finished(request, ([],))
    return tokens[-1] or 0


def save(roles: Roles, prompt: Sequence[int] = PROMPT) -> None:
    request = roles.request(next(_names), prompt)
    roles.scheduler.on_new(request)
    pages = roles.compute(request)
    roles.scheduler.finished(request, (pages,))
    orders = roles.orders()
    assert orders.saves
    roles.step(orders)
    until(lambda: found(roles, prompt) > 0)


def test_a_reset_forgets_what_is_stored_also_for_an_engine_that_starts_later(daemon: DaemonProcess) -> None:
    first = started(daemon)
    save(first)
    assert first.scheduler.reset()
    assert found(first) == 0
    first.close()
    daemon.kill()
    daemon.start()
    second = started(daemon)
    assert found(second) == 0
    save(second)
    third = started(daemon)
    assert found(third) == found(second) > 0, "they share the new generation"
    second.close()
    third.close()


def test_requests_from_before_a_reset_are_neither_loaded_nor_saved_after_it(daemon: DaemonProcess) -> None:
    roles = started(daemon)
    save(roles)
    before = roles.request(next(_names), [*PROMPT, 1])
    roles.scheduler.on_new(before)
    assert roles.scheduler.reset()
    assert roles.scheduler.matched_tokens(before, 0) == (0, False)
    pages = roles.compute(before)
    roles.scheduler.finished(before, (pages,))
    assert not roles.orders().saves
    roles.close()


def test_after_a_reset_without_the_daemon_nothing_is_looked_up_or_saved_until_it_has_begun_a_generation(
    daemon: DaemonProcess,
) -> None:
    roles = started(daemon)
    save(roles)
    daemon.kill()
    assert not roles.scheduler.reset()
    request = roles.request(next(_names), PROMPT)
    roles.scheduler.on_new(request)
    assert roles.scheduler.matched_tokens(request, 0) == (0, False)
    pages = roles.compute(request)
    roles.scheduler.finished(request, (pages,))
    assert not roles.orders().saves
    daemon.start()
    until(lambda: roles.scheduler.is_ready)
    assert found(roles) == 0
    save(roles)
    roles.close()


def test_a_history_shorter_than_a_block_is_found(daemon: DaemonProcess) -> None:
    roles = started(daemon)
    save(roles, PROMPT[:50])
    assert found(roles, PROMPT[:80]) == 50
    roles.close()


def test_a_prompt_of_which_nothing_is_stored_is_a_miss_without_a_call(daemon: DaemonProcess) -> None:
    roles = started(daemon)
    short = roles.request(next(_names), PROMPT[:50])
    long = roles.request(next(_names), PROMPT)
    with daemon.stopped():
        for request in (short, long):
            roles.scheduler.on_new(request)
            assert roles.scheduler.matched_tokens(request, 0) == (0, False)
    roles.close()
