"""The transformers connector with a real daemon, also one that dies and returns: the engine recomputes at most."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from kvservice_adapter.connectors.transformers import TransformersConnector
from kvservice_adapter.session import Conversation
from kvservice_api.errors import InvalidRequest
from kvservice_client import Client, Durability
from tests.daemon import DaemonProcess, until
from tests.forking import in_child
from tests.unit.connector_models import BLOCK_TOKENS, computed, connector, prompt, states, tiny_llama


def answer(model: Any, ids: torch.Tensor, cache: Any = None) -> list[list[int]]:
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 5, "pad_token_id": 0}
    output = model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, **options)
    tokens: list[list[int]] = output.tolist()
    return tokens


def test_a_history_survives_the_daemon_and_its_absence_only_costs_time(
    new_daemon: Callable[..., DaemonProcess],
) -> None:
    daemon, model, tokens = new_daemon(), tiny_llama(), prompt(6 * BLOCK_TOKENS + 1)
    cache = computed(model, tokens)
    with Client(daemon.address, timeout_s=2.0) as client:
        subject = connector(client, model)
        first = subject.save(tokens[:, : 2 * BLOCK_TOKENS], cache)
        second = subject.save(tokens, cache)
        assert (first.stored, second.stored, second.already_stored) == (2, 5, 2)

        daemon.kill()
        away = subject.restore(tokens)
        assert (away.tokens, away.tier, subject.save(tokens, cache).stored) == (0, "none", 0)
        assert away.error is not None

        daemon.start()
        until(lambda: subject.restore(tokens).tokens > 0)
        back = subject.restore(tokens)
        assert (back.tokens, back.tier, back.error) == (6 * BLOCK_TOKENS, "dram", None)
        for before, after in zip(states(cache), states(back.cache), strict=True):
            assert torch.equal(before[0][:, :, : back.tokens], after[0])
            assert torch.equal(before[1][:, :, : back.tokens], after[1])


def test_a_connector_from_before_a_fork_asks_nothing_in_the_child_and_says_why(daemon: DaemonProcess) -> None:
    model, tokens = tiny_llama(), prompt(4 * BLOCK_TOKENS + 1)
    cache = computed(model, tokens)
    with Client(daemon.address) as client:
        subject = connector(client, model)
        assert subject.save(tokens, cache).stored == 5

        def work() -> list[tuple[int, str]]:
            restored, saved = subject.restore(tokens), subject.save(tokens, cache)
            return [(restored.tokens, str(restored.error)), (saved.stored, str(saved.error))]

        for count, why in in_child(work):
            assert count == 0
            assert "made before fork()" in why
        assert subject.restore(tokens).tokens == 4 * BLOCK_TOKENS


def test_the_tier_that_served_is_named(daemon: DaemonProcess) -> None:
    model, tokens = tiny_llama(), prompt(4 * BLOCK_TOKENS + 1)
    with Client(daemon.address) as client:
        subject = connector(client, model)
        subject.save(tokens, computed(model, tokens), Durability.SSD)
        keys = [block.key for block in client.admin.list_blocks(layout_fingerprint=subject.layout.fingerprint)]
        assert subject.restore(tokens).tier == "dram"

        until(lambda: client.evict(keys[:1], "dram").evicted == 1)  # Once the load has ended.
        assert subject.restore(tokens).tier == "mixed"
        until(lambda: client.evict(keys, "dram").held == 0)
        assert subject.restore(tokens).tier == "ssd"


def turns(subject: TransformersConnector, model: Any, lengths: Sequence[int], session_id: str) -> list[int]:
    """A conversation that grows to each of these lengths. Returns how many tokens each turn found."""
    tokens, found = prompt(40), []
    first: list[tuple[torch.Tensor, torch.Tensor]] = []  # A second computation may differ slightly.
    for length in lengths:
        restored = subject.restore(tokens[:, :length], session_id=session_id)
        assert restored.error is None
        if restored.tokens:
            for there, back in zip(first, states(restored.cache), strict=True):
                assert torch.equal(there[0][:, :, : restored.tokens], back[0])
                assert torch.equal(there[1][:, :, : restored.tokens], back[1])
        with torch.inference_mode():
            model(tokens[:, restored.tokens : length], past_key_values=restored.cache)
        saved = subject.save(tokens[:, :length], restored.cache, session_id=session_id)
        assert (saved.refused, saved.error) == (0, None)
        found.append(restored.tokens)
        known = first[0][0].shape[2] if first else 0
        new = [(keys[:, :, known:], values[:, :, known:]) for keys, values in states(restored.cache)]
        pairs = zip(first, new, strict=bool(first))
        first = [(torch.cat([k, more_k], 2), torch.cat([v, more_v], 2)) for (k, v), (more_k, more_v) in pairs] or new
    return found


def test_with_a_session_the_whole_history_comes_back_at_every_turn(daemon: DaemonProcess) -> None:
    model = tiny_llama()
    lengths = [3, 5, 6, 8, 9, 17, 31]
    with Client(daemon.address) as client:
        # The test counts blocks, so it has a layout of its own.
        subject = connector(client, model, model_revision="whole")

        assert turns(subject, model, lengths, "whole") == [0, *lengths[:-1]]
        state = client.session(subject.layout, "whole").get()
        assert (state.token_count, state.tail_tokens, state.revision) == (31, 3, 7)
        # Seven full blocks and the tail: those of earlier turns are gone.
        until(lambda: sum(1 for _ in client.admin.list_blocks(None, subject.layout.fingerprint)) == 8)


def test_the_tail_survives_the_death_of_engine_and_daemon(new_daemon: Callable[..., DaemonProcess]) -> None:
    daemon, model, tokens = new_daemon(), tiny_llama(), prompt(40)
    with Client(daemon.address) as client:
        turns(connector(client, model), model, [4, 11], "killed")
    daemon.kill()
    daemon.start()
    with Client(daemon.address) as client:
        other = connector(client, model).restore(prompt(20), session_id="killed")
        assert (other.tokens, other.tier) == (0, "none"), "another conversation is not this session's"
        restored = connector(client, model).restore(tokens, session_id="killed")
        assert (restored.tokens, restored.tier) == (11, "dram")


def test_the_same_prompt_again_leaves_its_last_token_to_compute(daemon: DaemonProcess) -> None:
    model = tiny_llama()
    with Client(daemon.address) as client:
        assert turns(connector(client, model, salt=b"again"), model, [10, 10, 12, 12], "again") == [0, 9, 10, 11]


def test_a_conversation_whose_history_differs_from_its_session_starts_the_session_again(daemon: DaemonProcess) -> None:
    model = tiny_llama()
    with Client(daemon.address) as client:
        subject = connector(client, model, salt=b"edited")
        turns(subject, model, [14], "edited")
        edited = prompt(40)[:, :14]
        edited[0, 9:] = 1
        longer = torch.cat([edited, edited[:, :5]], dim=1)

        assert subject.restore(edited, session_id="edited").tokens == 8
        subject.save(edited, computed(model, edited), session_id="edited")
        assert subject.restore(longer, session_id="edited").tokens == 14
        shorter = longer[:, :6]
        subject.save(shorter, computed(model, shorter), session_id="edited")
        assert client.session(subject.layout, "edited").get().token_count == 6


def test_a_conversation_that_returns_to_an_earlier_branch_finds_all_of_it_though_its_session_names_another(
    daemon: DaemonProcess,
) -> None:
    model, tokens = tiny_llama(), prompt(6 * BLOCK_TOKENS + 1)
    edited = tokens.clone()
    edited[:, 2 * BLOCK_TOKENS :] += 1
    with Client(daemon.address) as client:
        subject = connector(client, model)
        for branch in (tokens, edited):
            assert subject.save(branch, computed(model, branch), session_id="branches").error is None
        assert subject.restore(tokens, session_id="branches").tokens == 6 * BLOCK_TOKENS


def test_a_session_that_was_truncated_is_left_as_it_is(daemon: DaemonProcess) -> None:
    model, tokens = tiny_llama(), prompt(40)[:, :14]
    with Client(daemon.address) as client:
        subject = connector(client, model, salt=b"cut")
        turns(subject, model, [14], "cut")
        cut = client.session(subject.layout, "cut").truncate([(4, 10)], 1)

        assert subject.restore(tokens, session_id="cut").tokens == 13, "its blocks are found by their tokens"
        assert subject.save(tokens, computed(model, tokens), session_id="cut").error is None
        assert client.session(subject.layout, "cut").get().tip == cut.tip


@pytest.mark.parametrize("transport", ["shm", "grpc"])
def test_without_a_session_the_partial_block_is_kept_too(daemon: DaemonProcess, transport: str) -> None:
    model, tokens = tiny_llama(num_hidden_layers=2), prompt(21)
    with daemon.client(transport=transport) as client:
        subject = connector(client, model, salt=transport.encode())
        cache = computed(model, tokens)

        assert subject.save(tokens[:, :15], cache).stored == 4
        for session_id in ("", "unknown"):
            restored = subject.restore(tokens, session_id=session_id)
            assert restored.tokens == 15
            for before, after in zip(states(cache), states(restored.cache), strict=True):
                assert torch.equal(before[0][:, :, :15], after[0])
                assert torch.equal(before[1][:, :, :15], after[1])
        assert subject.restore(tokens[:, :15]).tokens == 14, "one token is left to compute"
        assert subject.restore(tokens[:, :14]).tokens == 12, "the block has another token"
        assert answer(model, tokens, subject.restore(tokens).cache) == answer(model, tokens)


def test_conversations_without_a_session_find_their_own_last_turn(daemon: DaemonProcess) -> None:
    model, common = tiny_llama(num_hidden_layers=2), prompt(10)
    with daemon.client() as client:
        subject = connector(client, model, salt=b"branches")
        said = [common, common]
        for turn in range(3):
            for number in range(2):
                ids = torch.cat([said[number], prompt(3 + 4 * turn + number)], 1)
                history = subject.restore(ids)
                assert history.tokens == (said[number].shape[1] - 1 if turn else 0 if number == 0 else 8)
                output = torch.tensor(answer(model, ids, history.cache))
                assert output.tolist() == answer(model, ids)
                assert subject.save(output, history.cache).error is None
                said[number] = output


@pytest.mark.parametrize("name", ["user 17", "Grüße", "a\n", "x" * 201, 17, b"chat", ["a", "b"], [17], [""] * 2])
def test_a_session_id_that_is_not_allowed_raises_at_once(daemon: DaemonProcess, name: Any) -> None:
    model, tokens = tiny_llama(), prompt(9)
    with Client(daemon.address) as client:
        subject = connector(client, model, salt=b"ids")
        with pytest.raises(InvalidRequest):
            subject.restore(tokens, session_id=name)
        with pytest.raises(InvalidRequest):
            subject.save(tokens, computed(model, tokens), session_id=name)
        if isinstance(name, str):
            with pytest.raises(InvalidRequest, match="1 to 200"):
                Conversation(name)


def test_two_rows_of_one_session_are_refused_and_a_row_without_a_session_is_not(daemon: DaemonProcess) -> None:
    model, tokens = tiny_llama(), prompt(9).repeat(2, 1)
    mask = torch.ones_like(tokens)
    with Client(daemon.address) as client:
        subject = connector(client, model, salt=b"same")
        with pytest.raises(InvalidRequest, match="same session"):
            subject.restore(tokens, attention_mask=mask, session_id=["a", "a"])
        assert subject.restore(tokens, attention_mask=mask, session_id=["a", ""]).error is None


def test_every_session_id_that_is_allowed_here_is_allowed_by_the_daemon(daemon: DaemonProcess) -> None:
    model, tokens = tiny_llama(), prompt(9)
    with Client(daemon.address) as client:
        subject = connector(client, model, salt=b"allowed")
        for name in ("-", "_.:@/+=~-", "Az09", "x" * 200):
            assert subject.save(tokens, computed(model, tokens), session_id=name).error is None
            assert subject.restore(tokens, session_id=name).tokens == 8


def test_a_failed_update_of_the_session_is_in_the_answer(new_daemon: Callable[..., DaemonProcess]) -> None:
    model, tokens = tiny_llama(), prompt(9)
    with Client(new_daemon(session__sessions_max=1).address) as client:
        subject = connector(client, model)
        assert subject.save(tokens, computed(model, tokens), session_id="first").error is None
        saved = subject.save(tokens, computed(model, tokens), session_id="second")

        assert saved.refused == 0
        assert saved.error is not None


def test_while_the_daemon_is_down_one_line_says_so_with_its_reason(
    new_daemon: Callable[..., DaemonProcess], caplog: pytest.LogCaptureFixture
) -> None:
    daemon, model, tokens = new_daemon(), tiny_llama(), prompt(9)
    with Client(daemon.address, timeout_s=2.0) as client:
        subject = connector(client, model)
        subject.restore(tokens)
        daemon.kill()
        for _ in range(20):
            history = subject.restore(tokens)
            assert history.error is not None
        lines = [each.getMessage() for each in caplog.records if each.name.startswith("kvservice_adapter")]

    assert 1 <= len(lines) <= 2, lines  # One per reason.
    assert all("DAEMON_UNAVAILABLE: " in line or "DEADLINE_EXCEEDED: " in line for line in lines)
