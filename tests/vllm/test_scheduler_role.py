"""The scheduler's role on a real daemon: generations of keys, short histories, sessions, reports. No model runs."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from vllm.v1.request import Request

from benchmarks.vllm.roles import Roles
from kvservice_adapter.connectors.vllm.metadata import FailedLoad, StepReport
from kvservice_api.errors import SessionNotFound
from kvservice_api.v1 import blocks_pb2 as pb
from kvservice_client import Client, SessionState, block_chain
from tests.daemon import MIB, DaemonProcess, until
from tests.vllm.engine import model_folder
from tests.vllm.request_reports import report_of

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


def found(roles: Roles, prompt: Sequence[int] = PROMPT, **given: Any) -> int:
    """How many tokens of a request vLLM would load."""
    request = roles.request(next(_names), prompt, **given)
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


# Sessions


def turn(roles: Roles, tokens: Sequence[int], **given: Any) -> str:
    """A request whose prompt is computed and then ends, and whose blocks are saved. Returns its id."""
    request = roles.request(next(_names), tokens, **given)
    roles.scheduler.on_new(request)
    pages = roles.compute(request)
    roles.scheduler.finished(request, (pages,))
    roles.step(roles.orders())
    return request.request_id


def session_of(client: Client, roles: Roles, session_id: str) -> SessionState | None:
    try:
        return client.session(roles.scheduler.layout, session_id).get()
    except SessionNotFound:
        return None


def until_named(client: Client, roles: Roles, session_id: str, tokens: Sequence[int]) -> None:
    """Until the session names all blocks of these tokens, and no other."""
    keys = list(block_chain(roles.scheduler.layout, tokens, with_partial=True).keys)

    def is_named() -> bool:
        state = session_of(client, roles, session_id)
        return state is not None and [each.key for each in state.slices] == keys

    until(is_named)
    state = session_of(client, roles, session_id)
    assert state is not None
    assert state.token_count == state.stored_tokens == len(tokens)


def test_a_session_names_all_blocks_of_its_conversation_turn_after_turn_with_the_tail(daemon: DaemonProcess) -> None:
    roles = started(daemon)
    with daemon.client() as client:
        for end in (50, 200, 256, 296):
            turn(roles, PROMPT[:end], session_id="of-the-header")
            until_named(client, roles, "of-the-header", PROMPT[:end])
        turn(roles, PROMPT, kept={"session_id": "chat-17"})
        until_named(client, roles, "chat-17", PROMPT)
    roles.close()


def test_a_session_of_another_branch_names_that_branch(daemon: DaemonProcess) -> None:
    roles = started(daemon)
    edited = [*PROMPT[:100], *range(500, 540)]
    with daemon.client() as client:
        for tokens in (PROMPT, edited, [*edited, 1, 2, 3], PROMPT[:280]):
            turn(roles, tokens, session_id="chat")
            until_named(client, roles, "chat", tokens)
    roles.close()


def test_many_conversations_that_begin_alike_come_back_to_their_last_token_by_their_sessions(
    daemon: DaemonProcess,
) -> None:
    roles = started(daemon)
    conversations = {f"chat-{number}": [*PROMPT[:256], number, number + 1] for number in range(500, 506)}
    with daemon.client() as client:
        for session_id, tokens in conversations.items():
            turn(roles, tokens, session_id=session_id)
            until_named(client, roles, session_id, tokens)
    hits = [found(roles, [*tokens, 7], session_id=each) for each, tokens in conversations.items()]
    assert hits == [258] * 6
    assert min(found(roles, [*tokens, 7]) for tokens in conversations.values()) == 256, "without, only the newest four"
    roles.close()


def test_a_request_that_may_not_save_or_ends_early_leaves_its_session_as_it_is(daemon: DaemonProcess) -> None:
    roles = started(daemon)
    with daemon.client() as client:
        turn(roles, PROMPT[:200], session_id="chat")
        until_named(client, roles, "chat", PROMPT[:200])
        turn(roles, PROMPT, kept={"may_save": False}, session_id="chat")
        aborted = roles.request(next(_names), PROMPT, session_id="chat")
        roles.scheduler.on_new(aborted)
        pages = roles.compute(aborted)
        aborted.num_computed_tokens = 100
        roles.scheduler.finished(aborted, (pages,))
        roles.step(roles.orders())
        turn(roles, PROMPT, session_id="another")
        until_named(client, roles, "another", PROMPT)  # Turns are updated in their order.
        until_named(client, roles, "chat", PROMPT[:200])
    roles.close()


def test_a_request_of_which_two_ranks_have_loaded_parts_is_saved(daemon: DaemonProcess) -> None:
    roles = started(daemon)
    request = roles.request(next(_names), PROMPT)
    roles.scheduler.on_new(request)
    pages = roles.compute(request)
    failed = [FailedLoad(request.request_id, 0, valid, "damaged", is_unanswered=False) for valid in (128, 256)]
    roles.scheduler.on_bad_pages(set(pages[1:]), StepReport(failed=failed))
    roles.scheduler.finished(request, (pages,))
    assert roles.orders().saves
    roles.close()


def test_a_request_with_wrong_parameters_is_served_and_saved_and_a_line_says_what_is_ignored(
    daemon: DaemonProcess, caplog: pytest.LogCaptureFixture
) -> None:
    roles = started(daemon)
    with caplog.at_level(logging.WARNING), daemon.client() as client:
        for _ in range(3):
            turn(roles, PROMPT, kept={"load": "fast", "may_load": "yes", "x": 1, "session_id": "not an id"})
        until(lambda: found(roles) > 0)
        assert not list(client.admin.list_sessions())
    lines = [record.getMessage() for record in caplog.records if "parameter is ignored" in record.getMessage()]
    assert len(lines) == 4, lines
    assert any("not an id" in line and "The session is not kept" in line for line in lines)
    roles.close()


def test_a_session_is_updated_once_a_daemon_that_was_away_has_the_blocks(daemon: DaemonProcess) -> None:
    roles = started(daemon)
    with daemon.client() as client:
        turn(roles, PROMPT[:50], session_id="chat")
        until_named(client, roles, "chat", PROMPT[:50])
        with daemon.stopped():
            turn(roles, PROMPT[:60], session_id="chat")  # Its update waits, and this thread does not.
            turn(roles, PROMPT[:70], session_id="chat")
        until(lambda: roles.scheduler.is_ready)
        turn(roles, PROMPT[:80], session_id="chat")
        until_named(client, roles, "chat", PROMPT[:80])
    roles.close()


# Reports


def answer(roles: Roles, request: Request, own_tokens: int = 0) -> int:
    """A new request up to its first token. Returns how many tokens were to be loaded."""
    scheduler = roles.scheduler
    scheduler.on_new(request)
    while (tokens := scheduler.matched_tokens(request, own_tokens)[0]) is None:
        pass
    pages = roles.give_pages(request)
    scheduler.allocated(request, (pages,), tokens)
    roles.step(roles.orders([request]))
    scheduler.on_output(roles.worker.take_report(), set())
    request.num_computed_tokens = request.num_tokens
    request.append_output_token_ids(1)
    roles.step(roles.orders([request]))
    scheduler.finished(request, (pages,))
    return tokens


def test_the_report_of_a_hit_has_its_tokens_bytes_and_times_under_the_id_of_the_response(
    daemon: DaemonProcess,
) -> None:
    roles = started(daemon)
    save(roles)
    request = roles.request("cmpl-mine-0-0badcafe", [*PROMPT, 7, 8], {"load": "whole"})
    assert answer(roles, request) == len(PROMPT)
    with daemon.client() as client:
        report = report_of(client, "cmpl-mine")
        (lookup,) = client.admin.explain_request("cmpl-mine").lookups[1:]  # The second one, which has the tail.
    assert report.outcome == pb.REQUEST_OUTCOME_DONE
    assert report.plan == pb.REQUEST_PLAN_LOAD
    assert "whole" in report.plan_reason
    assert (report.history_tokens, report.new_tokens) == (len(PROMPT), 2)
    assert (report.loaded_tokens, report.computed_tokens) == (len(PROMPT), 0)
    assert report.loaded_bytes == roles.scheduler.layout.bytes_per_token * len(PROMPT)
    assert (report.tier, report.transport) == ("dram", "shm")
    assert report.times.HasField("lookup_ms")
    assert 0 < report.times.load_ms < report.times.first_token_ms
    assert report.times.waited_ms == report.times.load_ms
    assert lookup.hit_blocks == 2
    roles.close()


def test_the_report_counts_neither_as_loaded_nor_as_computed_what_vllm_has_itself(daemon: DaemonProcess) -> None:
    roles = started(daemon)
    save(roles)
    partly, wholly = (roles.request(next(_names), [*PROMPT, each], {"load": "layers"}) for each in (7, 8))
    assert answer(roles, partly, own_tokens=128) == len(PROMPT) - 128
    assert answer(roles, wholly, own_tokens=len(PROMPT)) == 0
    with daemon.client() as client:
        report = report_of(client, partly.request_id)
        assert (report.history_tokens, report.loaded_tokens, report.computed_tokens) == (296, 168, 0)
        report = report_of(client, wholly.request_id)
        assert report.outcome == pb.REQUEST_OUTCOME_DONE
        assert (report.history_tokens, report.loaded_tokens, report.computed_tokens) == (296, 0, 0)
        assert "vLLM has" in report.outcome_reason
    roles.close()


def test_the_report_of_a_request_that_was_preempted_counts_its_last_attempt(daemon: DaemonProcess) -> None:
    """vLLM still has what the first attempt has loaded."""
    roles = started(daemon)
    save(roles)
    scheduler, request = roles.scheduler, roles.request(next(_names), [*PROMPT, 7], {"load": "whole"})
    scheduler.on_new(request)
    pages = roles.give_pages(request)
    for own_tokens, loaded in ((0, len(PROMPT)), (len(PROMPT), 0)):
        while (tokens := scheduler.matched_tokens(request, own_tokens)[0]) is None:
            pass
        assert tokens == loaded
        scheduler.allocated(request, (pages,), tokens)
        roles.step(roles.orders([request]))
        scheduler.on_output(roles.worker.take_report(), set())
        request.num_preemptions += 1
    request.num_preemptions -= 1
    request.append_output_token_ids(1)
    roles.step(roles.orders([request]))
    with daemon.client() as client:
        report = report_of(client, request.request_id)
    assert (report.history_tokens, report.loaded_tokens, report.computed_tokens) == (len(PROMPT), 0, 0)
    roles.close()


def test_a_request_of_which_more_is_stored_than_its_prompt_after_a_preemption_is_reported(
    daemon: DaemonProcess,
) -> None:
    roles = started(daemon)
    save(roles, range(256))
    scheduler, request = roles.scheduler, roles.request(next(_names), range(255))
    scheduler.on_new(request)
    for tokens in (0, 255):
        until(lambda: scheduler.matched_tokens(request, 0)[0] is not None)
        assert scheduler.matched_tokens(request, 0)[0] == tokens
        request.append_output_token_ids(255)
        request.num_preemptions += 1  # Before a step has reported its first token.
    scheduler.finished(request, ([],))
    with daemon.client() as client:
        report = report_of(client, request.request_id)
    assert (report.history_tokens, report.new_tokens) == (256, 0)
    roles.close()


def test_the_report_of_a_miss_says_whether_it_was_looked_up(daemon: DaemonProcess) -> None:
    roles = started(daemon)
    miss, other = roles.request(next(_names), PROMPT), roles.request(next(_names), PROMPT, {"may_load": False})
    assert answer(roles, miss) == answer(roles, other) == 0
    with daemon.client() as client:
        report = report_of(client, miss.request_id)
        assert (report.outcome, report.outcome_reason) == (pb.REQUEST_OUTCOME_MISS, "")
        assert (report.history_tokens, report.new_tokens) == (0, len(PROMPT))
        assert report.times.HasField("first_token_ms")
        report = report_of(client, other.request_id)
        assert report.outcome == pb.REQUEST_OUTCOME_MISS
        assert "may_load" in report.outcome_reason
    roles.close()


def test_the_report_of_a_request_whose_load_failed_says_why(daemon: DaemonProcess) -> None:
    roles = started(daemon)
    save(roles)
    request = roles.request(next(_names), [*PROMPT, 7], {"load": "whole"})
    roles.scheduler.on_new(request)
    tokens: list[int | None] = [None]
    while tokens[-1] is None:
        tokens.append(roles.scheduler.matched_tokens(request, 0)[0])
    pages = roles.give_pages(request)
    roles.scheduler.allocated(request, (pages,), len(PROMPT))
    orders = roles.orders([request])
    daemon.kill()
    daemon.start()  # It does not know the ticket.
    roles.step(orders)
    roles.scheduler.on_output(roles.worker.take_report(), set())
    request.append_output_token_ids(1)
    roles.orders([request])
    with daemon.client() as client:
        report = report_of(client, request.request_id)
    assert report.outcome == pb.REQUEST_OUTCOME_FAILED_OVER
    assert report.outcome_reason
    assert (report.history_tokens, report.loaded_tokens, report.computed_tokens) == (296, 0, 296)
    roles.close()


def test_the_report_of_a_request_that_was_preempted_is_of_its_last_attempt(daemon: DaemonProcess) -> None:
    roles = started(daemon)
    save(roles)
    scheduler, request = roles.scheduler, roles.request(next(_names), [*PROMPT, 7], {"load": "whole"})
    scheduler.on_new(request)
    while scheduler.matched_tokens(request, 0)[0] is None:
        pass
    scheduler.allocated(request, (roles.give_pages(request),), len(PROMPT))
    roles.step(roles.orders([request]))
    scheduler.on_output(roles.worker.take_report(), set())
    with daemon.client() as client:
        client.admin.discard_all()
        request.num_preemptions += 1
        while (tokens := scheduler.matched_tokens(request, 0)[0]) is None:
            pass
        assert tokens == 0
        request.append_output_token_ids(1)
        roles.orders([request])
        report = report_of(client, request.request_id)
    assert report.outcome == pb.REQUEST_OUTCOME_MISS
    assert (report.history_tokens, report.loaded_tokens, report.computed_tokens) == (0, 0, 0)
    assert (report.plan, report.loaded_bytes) == (pb.REQUEST_PLAN_UNSPECIFIED, 0)
    roles.close()


def test_requests_while_the_daemon_is_away_are_reported_once_it_is_back(daemon: DaemonProcess) -> None:
    roles = started(daemon)
    save(roles)
    failing = [roles.request(next(_names), [*PROMPT, each]) for each in range(8)]
    daemon.kill()
    for request in failing:
        assert answer(roles, request) == 0
    daemon.start()
    with daemon.client() as client:
        outcomes = [report_of(client, each.request_id).outcome for each in failing]
    assert outcomes[0] == pb.REQUEST_OUTCOME_FAILED_OVER, "its lookup had no answer"
    assert outcomes[-1] == pb.REQUEST_OUTCOME_BREAKER_OPEN, "the daemon was not asked any more"
    roles.close()


def test_a_request_that_ends_before_its_first_token_is_reported(daemon: DaemonProcess) -> None:
    roles = started(daemon)
    request = roles.request(next(_names), PROMPT)
    roles.scheduler.on_new(request)
    roles.scheduler.finished(request, ([],))
    with daemon.client() as client:
        report = report_of(client, request.request_id)
    assert report.outcome_reason == "it ended without a token"
    assert not report.times.HasField("first_token_ms")
    roles.close()


def test_a_request_whose_id_is_longer_than_the_daemon_allows_is_looked_up(daemon: DaemonProcess) -> None:
    roles = started(daemon)
    save(roles)
    request = roles.request("chatcmpl-" + "x" * 300, [*PROMPT, 7], {"load": "whole"})
    assert answer(roles, request) == len(PROMPT)
    roles.close()


# Hints


def test_a_request_of_a_known_session_waits_by_its_session_and_loads_from_dram_what_was_promoted_meanwhile(
    daemon: DaemonProcess,
) -> None:
    roles = started(daemon)
    with daemon.client() as client:
        turn(roles, PROMPT, session_id="chat")
        until_named(client, roles, "chat", PROMPT)
        until(lambda: all(block.on_ssd for block in client.admin.list_blocks()))
        client.evict(sessions=[client.session(roles.scheduler.layout, "chat")], tier="dram")
        for kept, by_session in ({"session_id": "chat"}, True), ({}, False):
            request = roles.request(next(_names), [*PROMPT, 1], kept=kept)
            roles.scheduler.on_new(request)
            roles.orders()
            waiting = roles.scheduler._client.hints()._queue[request.request_id]
            assert bool(waiting.subject.session.session_id) == by_session
            until(lambda request=request: roles.scheduler._queue.is_in_dram(request.request_id))  # type: ignore[misc]
            until(lambda request=request: roles.scheduler.matched_tokens(request, 0)[0] is not None)  # type: ignore[misc]
            roles.scheduler.finished(request, ([],))
            roles.orders()
            report = report_of(client, request.request_id)
            assert (report.tier, report.history_tokens) == ("dram", len(PROMPT))
            client.evict(sessions=[client.session(roles.scheduler.layout, "chat")], tier="dram")
    roles.close()
