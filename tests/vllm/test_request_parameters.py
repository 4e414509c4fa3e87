"""The connector's parameters of a request, and the id by which users know it, with vLLM's own naming."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.engine.parallel_sampling import ParentRequest

from kvservice_adapter.connectors.vllm.request_parameters import (
    RequestHints,
    RequestParameters,
    ToolCall,
    parameters_of,
)
from kvservice_adapter.connectors.vllm.request_progress import response_id
from kvservice_adapter.connectors.vllm.settings import LoadMode

pytestmark = pytest.mark.fast

DEFAULTS = RequestParameters(LoadMode.AUTO, may_load=True, may_save=True, session_id="")


def read(transfer: Any, session_id: str | None = None) -> tuple[RequestParameters, list[str]]:
    """The parameters, and the names of those that are ignored."""
    request = SimpleNamespace(kv_transfer_params=transfer, session_id=session_id)
    given, ignored = parameters_of(request, LoadMode.AUTO)
    assert all(each.why for each in ignored)
    return given, [each.name for each in ignored]


def kept(**entry: Any) -> dict[str, Any]:
    return {"kvservice": entry, "of_another_connector": 1}


@pytest.mark.parametrize("transfer", [None, {}, {"do_remote_prefill": True}, {"kvservice": None}, {"kvservice": {}}])
def test_without_an_entry_there_are_the_defaults(transfer: Any) -> None:
    assert read(transfer) == (DEFAULTS, [])


def test_an_entry_has_a_way_to_load_two_permissions_and_a_session_id() -> None:
    given, ignored = read(kept(load="layers", may_load=False, may_save=False, session_id="chat-17"))

    assert given == RequestParameters(LoadMode.LAYERS, may_load=False, may_save=False, session_id="chat-17")
    assert not ignored


@pytest.mark.parametrize(
    ("transfer", "name"),
    [
        (kept(load="fast"), "load"),
        (kept(load=["whole"]), "load"),
        (kept(may_load="no"), "may_load"),
        (kept(may_save=0), "may_save"),
        (kept(may_save=None), "may_save"),
        (kept(mayload=False), ""),
        (kept(**{"x" * 10_000: 1}), ""),
        ({"kvservice": "whole"}, "kvservice"),
        ({"kvservice": ["whole"]}, "kvservice"),
        (["kvservice"], "kv_transfer_params"),
        (kept(session_id=17), "session_id"),
        (kept(session_id="chat 17"), "session_id"),
        (kept(session_id="c" * 201), "session_id"),
        (kept(session_id=["chat"]), "session_id"),
    ],
)
def test_what_is_wrong_is_ignored_and_named(transfer: Any, name: str) -> None:
    assert read(transfer) == (DEFAULTS, [name])


def test_a_wrong_parameter_changes_no_other() -> None:
    given, ignored = read(kept(load="fast", may_save=False, unknown=1, session_id="chat-17"))

    assert given == DEFAULTS._replace(may_save=False, session_id="chat-17")
    assert sorted(ignored) == ["", "load"]


def test_the_line_about_a_long_value_is_short() -> None:
    _, ignored = parameters_of(
        SimpleNamespace(kv_transfer_params=kept(load="x" * 10_000), session_id=None), LoadMode.AUTO
    )

    assert len(ignored[0].why) < 200


def test_the_session_id_of_the_entry_precedes_vllms_own() -> None:
    assert read(None, "of-the-header")[0].session_id == "of-the-header"
    assert read(kept(may_save=True), "of-the-header")[0].session_id == "of-the-header"
    assert read(kept(session_id="of-the-entry"), "of-the-header")[0].session_id == "of-the-entry"


def test_a_session_id_of_vllms_own_that_the_daemon_refuses_is_ignored() -> None:
    assert read(None, "a session id with spaces") == (DEFAULTS, ["session_id"])


def hinted(**hints: Any) -> dict[str, Any]:
    return {"kvservice": {}, "kv_hints": hints}


@pytest.mark.parametrize(
    ("transfer", "hints"),
    [
        (hinted(), RequestHints()),
        (hinted(priority=-3, typing=True), RequestHints(priority=-3, typing=True)),
        (hinted(session_ended=True, do_not_keep=False), RequestHints(session_ended=True)),
        (hinted(do_not_keep=True), RequestHints(do_not_keep=True)),
        (hinted(tool_call={"name": "search"}), RequestHints(tool_call=ToolCall("search", None))),
        (hinted(tool_call={"name": "run", "expected_s": 2.5}), RequestHints(tool_call=ToolCall("run", 2.5))),
        (hinted(tool_call={"name": "a\ud800"}), RequestHints(tool_call=ToolCall("a?", None))),
        (hinted(tool_call=None), RequestHints()),
    ],
)
def test_hints_are_what_the_application_knows(transfer: Any, hints: RequestHints) -> None:
    assert read(transfer) == (DEFAULTS._replace(hints=hints), [])


@pytest.mark.parametrize(
    ("transfer", "name"),
    [
        ({"kv_hints": ["typing"]}, "kv_hints"),
        (hinted(typing=1), "typing"),
        (hinted(type=True), ""),
        (hinted(priority=True), "priority"),
        (hinted(priority=2**40), "priority"),
        (hinted(priority="high"), "priority"),
        (hinted(tool_call="search"), "tool_call"),
        (hinted(tool_call={}), "tool_call"),
        (hinted(tool_call={"name": "n" * 201}), "tool_call"),
        (hinted(tool_call={"name": "search", "expected_s": -1}), "tool_call"),
        (hinted(tool_call={"name": "search", "expected_s": float("nan")}), "tool_call"),
        (hinted(tool_call={"name": "search", "seconds": 1}), "tool_call"),
    ],
)
def test_a_wrong_hint_is_ignored_and_named(transfer: Any, name: str) -> None:
    assert read(transfer) == (DEFAULTS, [name])


# The id that users know


def named_by_vllm(given: str, index: int | None = None) -> str:
    """The id that the scheduler gets; with `index`, of one of several choices."""
    parameters = SamplingParams(n=1 if index is None else 4)
    request = EngineCoreRequest(
        request_id=given,
        prompt_token_ids=[1],
        mm_features=None,
        sampling_params=parameters,
        pooling_params=None,
        arrival_time=0.0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
    )
    InputProcessor.assign_request_id(request)
    return request.request_id if index is None else ParentRequest(request).get_child_info(index)[0]


@pytest.mark.parametrize(
    ("given", "known"),
    [
        ("cmpl-4f0c-0", "cmpl-4f0c"),
        ("cmpl-mine-1-12", "cmpl-mine-1"),
        ("chatcmpl-4f0c", "chatcmpl-4f0c"),
        ("resp_4f0c_0", "resp_4f0c"),
        ("chatcmpl-job_3-0", "chatcmpl-job_3-0"),
        ("7", "7"),
        ("my-own-id", "my-own-id"),
    ],
)
def test_a_request_is_known_by_the_id_of_its_response(given: str, known: str) -> None:
    assert response_id(named_by_vllm(given), is_randomized=True) == known
    if "cmpl-" in given:
        assert response_id(named_by_vllm(given, index=3), is_randomized=True) == known


def test_an_id_to_which_vllm_adds_nothing_stays_as_it_is() -> None:
    assert response_id("chatcmpl-0badcafe", is_randomized=False) == "chatcmpl-0badcafe"


def test_an_id_that_is_too_long_for_the_daemon_is_cut() -> None:
    assert response_id("chatcmpl-" + "é" * 200, is_randomized=False) == "chatcmpl-" + "é" * 95
