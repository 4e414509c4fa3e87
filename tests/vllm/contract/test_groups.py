"""Several KV cache groups, and pages that vLLM frees behind a sliding window, under vLLM's real scheduler."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
from vllm.v1.request import RequestStatus

from kvservice_adapter.connectors.vllm.settings import LoadMode
from kvservice_client import Client
from tests.daemon import MIB, DaemonProcess, until
from tests.vllm.contract.numbers import NumberedModel
from tests.vllm.contract.setup import Setup
from tests.vllm.contract.steps import Steps
from tests.vllm.contract.test_scheduler import (
    BLOCK,
    PAGE,
    blocks_of,
    chain_of,
    damage,
    expect_nothing_is_held,
    expect_right_numbers,
    ours,
    prompt,
    store,
)
from tests.vllm.contract.worker import Runner

WINDOW = 2 * BLOCK
MODELS = {
    "mixed": NumberedModel(layers=4, windows=(WINDOW, WINDOW, WINDOW, 0)),
    "windows only": NumberedModel(layers=2, windows=(WINDOW, WINDOW)),
    "pages of two sizes": NumberedModel(layers=4, windows=(WINDOW, WINDOW, WINDOW, 0), wide_dim=64),
}


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    with DaemonProcess(tmp_path_factory.mktemp("daemon"), dram__capacity_bytes=256 * MIB) as process:
        yield process
        code = process.process.poll()
        assert code is None, f"the daemon ended with {code}: {process.lines[-20:]}"


@pytest.fixture
def client(daemon: DaemonProcess) -> Iterator[Client]:
    with daemon.client() as made:
        yield made


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> NumberedModel:
    return MODELS[request.param]


@pytest.fixture
def tokens(request: pytest.FixtureRequest) -> list[int]:
    """A prompt of the test's own, three windows long."""
    return prompt(request.node.nodeid, 6 * BLOCK)


def grouped(daemon: DaemonProcess, model: NumberedModel, **more: Any) -> Setup:
    return ours(daemon, more.pop("load", "between_steps"), model=model, **more)


def expect_all_is_stored(client: Client, steps: Steps, tokens: list[int]) -> None:
    """Wait until a history is stored to its last token, and compare what is stored."""
    steps.forget_pages()
    blocks, chain = blocks_of(client, steps), chain_of(steps, tokens, with_partial=True)
    until(lambda: blocks.contains(chain) == len(chain))
    assert expect_right_numbers(client, steps, tokens, with_partial=True) == len(tokens)


def test_the_rig_has_the_groups_that_it_is_meant_to_have(daemon: DaemonProcess) -> None:
    found = {}
    for name, model in MODELS.items():
        with Steps(grouped(daemon, model)) as steps:
            groups = steps.scheduler.kv_cache_config.kv_cache_groups
            found[name] = [(len(each.layer_names), each.kv_cache_spec.block_size) for each in groups]
    assert found == {
        "mixed": [(1, PAGE)] * 4,
        "windows only": [(2, PAGE)],
        "pages of two sizes": [(1, 2 * PAGE)] * 3 + [(1, PAGE)],
    }


@pytest.mark.parametrize("runner", Runner)
@pytest.mark.parametrize("transport", ["shm", "grpc"])
def test_a_hit_has_the_numbers_of_a_computation(
    daemon: DaemonProcess, client: Client, model: NumberedModel, runner: Runner, transport: str, tokens: list[int]
) -> None:
    with Steps(grouped(daemon, model, options={"transport": transport}), runner) as steps:
        store(client, steps, tokens)
        assert expect_right_numbers(client, steps, tokens) == len(tokens)
        request = steps.ask([*tokens, *range(50)], 40)
        steps.expect(request.request_id)
        assert steps.hits[request.request_id] == len(tokens)
        expect_nothing_is_held(client, steps)


@pytest.mark.parametrize("load", ["whole", "layers"])
def test_loads_are_between_steps_also_where_another_way_is_asked_for(
    daemon: DaemonProcess, client: Client, load: str, tokens: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    """Within a step vLLM has no report for a load that fails: it could continue with wrong tokens."""
    caplog.set_level(logging.INFO, "kvservice_adapter")
    with Steps(grouped(daemon, MODELS["mixed"], load=load)) as steps:
        store(client, steps, tokens)
        request = steps.requests[steps.add(tokens, 10)]
        steps.until(lambda: request.status is RequestStatus.WAITING_FOR_REMOTE_KVS)
        (order,) = steps.orders.loads
        assert order.mode is LoadMode.BETWEEN_STEPS
        steps.run()
        steps.expect(request.request_id)
        assert len([each for each in caplog.messages if '"between_steps"' in each]) == 1


def test_only_tokens_that_the_window_has_pages_for_are_copied(
    daemon: DaemonProcess, client: Client, model: NumberedModel, tokens: list[int]
) -> None:
    """And vLLM's null page, which all requests share, is not written."""
    with Steps(grouped(daemon, model)) as steps:
        store(client, steps, tokens)
        for pages in steps.worker.pages.values():
            pages.fill_(-1.0)
        request = steps.requests[steps.add([*tokens, *range(50)], 10)]
        steps.until(lambda: request.status is RequestStatus.WAITING_FOR_REMOTE_KVS)
        (order,) = steps.orders.loads
        for group, begin, ids in zip(
            steps.scheduler.kv_cache_config.kv_cache_groups, order.begins, order.page_ids, strict=True
        ):
            size = group.kv_cache_spec.block_size
            has_window = type(group.kv_cache_spec).__name__ == "SlidingWindowSpec"
            assert begin == ((len(tokens) - WINDOW + 1) // size * size if has_window else 0)
            assert all(ids[begin // size :])
            assert not any(ids[: begin // size])
        steps.run()
        steps.expect(request.request_id)
        assert all((pages[0] == -1.0).all() for pages in steps.worker.pages.values())
        expect_nothing_is_held(client, steps)


@pytest.mark.fast
def test_null_pages_are_not_saved(
    daemon: DaemonProcess, client: Client, model: NumberedModel, tokens: list[int]
) -> None:
    """vLLM's own prefix cache has only the window of a history that the store does not have."""
    with Steps(grouped(daemon, model)) as steps:
        steps.ask(tokens, given={"may_save": False})
        longer = [*tokens, *prompt(f"{tokens[0]} more", 100)]
        request = steps.ask(longer, 100)
        steps.expect(request.request_id)
        assert steps.own_hits[request.request_id] > WINDOW
        steps.settle()
        assert expect_right_numbers(client, steps, list(request.all_token_ids)) == 0
        expect_nothing_is_held(client, steps)


@pytest.mark.parametrize("is_asynchronous", [False, True], ids=["in one step", "a step ahead"])
def test_what_follows_a_shared_history_is_saved_for_each_request(
    daemon: DaemonProcess, client: Client, model: NumberedModel, is_asynchronous: bool, tokens: list[int]
) -> None:
    """Only the first has computed the history. Of it the others have the window, and the daemon had nothing."""
    with Steps(grouped(daemon, model, step_tokens=2000, pages=300, is_asynchronous=is_asynchronous)) as steps:
        ids = [steps.add([*tokens, number], 3 * BLOCK) for number in range(3)]
        steps.run()
        for request_id in ids:
            steps.expect(request_id)
            assert steps.hits[request_id] == 0
        assert steps.own_hits[ids[-1]] > WINDOW
        steps.forget_pages()
        for request_id in ids:
            expect_all_is_stored(client, steps, list(steps.requests[request_id].all_token_ids)[:-1])
        expect_nothing_is_held(client, steps)


def test_a_hit_ends_with_the_last_block_that_the_prompts_share(
    daemon: DaemonProcess, client: Client, model: NumberedModel, tokens: list[int]
) -> None:
    with Steps(grouped(daemon, model)) as steps:
        store(client, steps, tokens)
        other = [*tokens[: 4 * BLOCK], 1, 2, 3, *tokens[4 * BLOCK :]]
        request = steps.ask(other, 10)
        steps.expect(request.request_id)
        assert steps.hits[request.request_id] == 4 * BLOCK
        expect_all_is_stored(client, steps, list(request.all_token_ids)[:-1])
        expect_nothing_is_held(client, steps)


@pytest.mark.parametrize("runner", Runner)
def test_a_miss_is_computed(
    daemon: DaemonProcess, client: Client, model: NumberedModel, runner: Runner, tokens: list[int]
) -> None:
    with Steps(grouped(daemon, model), runner) as steps:
        request = steps.ask(tokens, 10)
        steps.expect(request.request_id)
        assert steps.hits[request.request_id] == 0
        expect_nothing_is_held(client, steps)


def test_all_but_one_token_of_a_stored_prompt_is_loaded(
    daemon: DaemonProcess, client: Client, model: NumberedModel, tokens: list[int]
) -> None:
    with Steps(grouped(daemon, model)) as steps:
        store(client, steps, tokens)
        request = steps.ask(tokens, 10)
        steps.expect(request.request_id)
        assert steps.hits[request.request_id] == len(tokens) - 1
        expect_nothing_is_held(client, steps)


def test_pages_that_are_vllms_own_are_not_written(
    daemon: DaemonProcess, client: Client, model: NumberedModel, tokens: list[int]
) -> None:
    own = 3 * BLOCK
    with Steps(grouped(daemon, model)) as steps:
        store(client, steps, tokens)
        kept = steps.requests[steps.add(tokens[:own], 1000, given={"may_load": False})]
        steps.until(lambda: kept.num_output_tokens > 0)
        shared = {page for ids in steps.scheduler.kv_cache_manager.get_block_ids(kept.request_id) for page in ids}
        request = steps.requests[steps.add(tokens)]
        steps.until(lambda: request.status is RequestStatus.WAITING_FOR_REMOTE_KVS)
        (order,) = steps.orders.loads
        assert order.first_token > 0
        groups = steps.scheduler.kv_cache_config.kv_cache_groups
        for group, begin, ids in zip(groups, order.begins, order.page_ids, strict=True):
            written = ids[begin // group.kv_cache_spec.block_size :]
            assert begin >= order.first_token
            assert written
            assert shared.isdisjoint(written)
        steps.run(request.request_id)
        assert steps.own_hits[request.request_id] == order.first_token
        assert steps.hits[request.request_id] == len(tokens) - 1 - order.first_token
        steps.expect(request.request_id)
        steps.abort(kept.request_id)
        expect_nothing_is_held(client, steps)


@pytest.mark.parametrize("is_asynchronous", [False, True], ids=["in one step", "a step ahead"])
@pytest.mark.parametrize("runner", Runner)
def test_a_conversation_that_is_longer_than_the_window_comes_back_to_its_last_token(
    daemon: DaemonProcess,
    client: Client,
    model: NumberedModel,
    runner: Runner,
    is_asynchronous: bool,
    tokens: list[int],
) -> None:
    """The window moves over what vLLM generates: each block is saved before its first page is given away."""
    with Steps(grouped(daemon, model, is_asynchronous=is_asynchronous), runner) as steps:
        history, stored = tokens[:100], 0
        for _ in range(3):
            request = steps.ask(history, 3 * WINDOW + 17)
            steps.expect(request.request_id)
            assert steps.hits[request.request_id] == stored
            history = list(request.all_token_ids)
            stored = len(history) - 1  # vLLM has not computed the last token of its answer.
            expect_all_is_stored(client, steps, history[:-1])
            history += prompt(f"{tokens[0]} {stored}", 40)
        expect_nothing_is_held(client, steps)


@pytest.mark.parametrize("step_tokens", [50, 77, 200])
def test_what_is_computed_in_chunks_is_saved_whole(
    daemon: DaemonProcess, client: Client, model: NumberedModel, step_tokens: int, tokens: list[int]
) -> None:
    """Chunks end inside pages and blocks, and are shorter or longer than the window."""
    with Steps(grouped(daemon, model, step_tokens=step_tokens)) as steps:
        histories = [prompt(f"{tokens[0]} {number}", 5 * BLOCK + 30) for number in range(3)]
        ids = [steps.add(history, 60) for history in histories]
        steps.run()
        for request_id in ids:
            steps.expect(request_id)
            expect_all_is_stored(client, steps, list(steps.requests[request_id].all_token_ids)[:-1])
        for history in histories:
            again = steps.ask([*history, 5], 20)
            steps.expect(again.request_id)
            assert steps.hits[again.request_id] == len(history) // BLOCK * BLOCK
            steps.forget_pages()
        expect_nothing_is_held(client, steps)


@pytest.mark.parametrize("runner", Runner)
def test_where_a_block_is_longer_than_the_window_saves_end_with_the_block_that_lost_a_page(
    daemon: DaemonProcess, client: Client, runner: Runner, tokens: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    short = NumberedModel(layers=4, windows=(PAGE, PAGE, PAGE, 0))
    with Steps(grouped(daemon, short), runner) as steps:
        assert any("Set block_tokens" in each for each in caplog.messages)
        request = steps.ask(tokens[: 2 * BLOCK], 4 * BLOCK)
        steps.expect(request.request_id)
        steps.forget_pages()
        history = list(request.all_token_ids)
        until(lambda: expect_right_numbers(client, steps, history) == 2 * BLOCK)
        again = steps.ask([*history, 1], 10)
        steps.expect(again.request_id)
        assert steps.hits[again.request_id] == 2 * BLOCK
        expect_nothing_is_held(client, steps)


@pytest.mark.parametrize("runner", Runner)
def test_requests_that_were_preempted_continue_with_what_they_saved(
    daemon: DaemonProcess, client: Client, model: NumberedModel, runner: Runner, tokens: list[int]
) -> None:
    pages = {"mixed": 60, "windows only": 18, "pages of two sizes": 36}
    with Steps(
        grouped(daemon, model, pages=next(pages[each] for each in MODELS if MODELS[each] is model)), runner
    ) as steps:
        ids = [steps.add(prompt(f"{tokens[0]} {number}", 2 * BLOCK), 150) for number in range(4)]
        steps.run()
        for request_id in ids:
            steps.expect(request_id)
            expect_right_numbers(client, steps, list(steps.requests[request_id].all_token_ids))
        assert sum(request.num_preemptions for request in steps.requests.values()) > 0
        expect_nothing_is_held(client, steps)


@pytest.mark.parametrize("runner", Runner)
def test_an_abort_during_a_load_leaves_nothing_behind(
    daemon: DaemonProcess, client: Client, model: NumberedModel, runner: Runner, tokens: list[int]
) -> None:
    with Steps(grouped(daemon, model), runner) as steps:
        store(client, steps, tokens)
        request = steps.requests[steps.add(tokens)]
        steps.until(lambda: request.status is RequestStatus.WAITING_FOR_REMOTE_KVS)
        steps.abort(request.request_id)
        expect_nothing_is_held(client, steps)
        again = steps.ask(tokens, 10)
        steps.expect(again.request_id)
        assert steps.hits[again.request_id] == len(tokens) - 1


@pytest.mark.parametrize("when", ["queued", "scheduled", "computing", "generating"])
def test_an_abort_leaves_nothing_behind(
    daemon: DaemonProcess, client: Client, model: NumberedModel, when: str, tokens: list[int]
) -> None:
    with Steps(grouped(daemon, model, step_tokens=100)) as steps:
        store(client, steps, tokens)
        request = steps.requests[steps.add([*tokens, *prompt(f"{tokens[0]} more", 300)], 1000)]
        if when == "scheduled":
            steps.step(lambda: steps.abort(request.request_id))
        elif when != "queued":
            steps.until(lambda: request.num_computed_tokens > len(tokens) + (500 if when == "generating" else 50))
        steps.abort(request.request_id)
        expect_nothing_is_held(client, steps)
        expect_right_numbers(client, steps, list(request.all_token_ids))


@pytest.mark.fast
@pytest.mark.parametrize("damaged", [0, 4], ids=["the first block", "a block of the window"])
@pytest.mark.parametrize("runner", Runner)
def test_a_load_that_fails_is_computed_from_the_first_token_and_is_not_tried_again(
    daemon: DaemonProcess, client: Client, model: NumberedModel, runner: Runner, damaged: int, tokens: list[int]
) -> None:
    if not damaged and all(model.windows):
        damaged = 5  # Blocks in front of the window are not read.
    with Steps(grouped(daemon, model), runner) as steps:
        store(client, steps, tokens)
        damage(daemon, tokens, damaged, model)
        running = steps.add(prompt(f"{tokens[0]} running", 100), 60)
        failed: list[str] = []
        request = steps.requests[steps.add(tokens, 10)]
        while not request.is_finished():
            failed += sorted(steps.step().failed_recving)
        steps.run()
        assert failed == [request.request_id]
        assert not steps.bad_pages
        steps.expect(request.request_id)
        steps.expect(running)
        expect_nothing_is_held(client, steps)
        steps.forget_pages()
        again = steps.ask(tokens, 10)  # The damaged block has been stored again.
        steps.expect(again.request_id)
        until(lambda: expect_right_numbers(client, steps, tokens) == len(tokens))


def test_with_the_policy_fail_vllm_ends_the_request_and_frees_its_pages(
    daemon: DaemonProcess, client: Client, model: NumberedModel, tokens: list[int]
) -> None:
    with Steps(grouped(daemon, model, failure_policy="fail")) as steps:
        store(client, steps, tokens)
        damage(daemon, tokens, 5, model)
        request = steps.ask(tokens, 10)
        assert request.status is RequestStatus.FINISHED_ERROR
        expect_nothing_is_held(client, steps)


@pytest.mark.parametrize("runner", Runner)
def test_a_daemon_that_is_killed_before_a_load_costs_a_computation(
    tmp_path: Any, model: NumberedModel, runner: Runner, tokens: list[int]
) -> None:
    with DaemonProcess(tmp_path) as own, own.client() as client, Steps(grouped(own, model), runner) as steps:
        store(client, steps, tokens)
        request = steps.requests[steps.add(tokens, 10)]

        def kill_once_it_is_scheduled() -> None:
            if request.status is not RequestStatus.WAITING:
                own.kill()

        while request.status is RequestStatus.WAITING:  # The daemon has not answered yet.
            steps.step(kill_once_it_is_scheduled)
        steps.run()
        steps.expect(request.request_id)
        steps.expect_nothing_is_held()


def test_a_reset_under_running_requests_computes_them_again(
    daemon: DaemonProcess, client: Client, model: NumberedModel, tokens: list[int]
) -> None:
    with Steps(grouped(daemon, model)) as steps:
        ids = [steps.add(prompt(f"{tokens[0]} {number}", 3 * BLOCK), 200) for number in range(3)]
        steps.until(lambda: all(steps.requests[each].num_output_tokens > 20 for each in ids))
        assert steps.scheduler.reset_prefix_cache(reset_running_requests=True, reset_connector=True)
        steps.run()
        for request_id in ids:
            steps.expect(request_id)
        steps.forget_pages()
        request = steps.ask(prompt(f"{tokens[0]} 0", 3 * BLOCK), 10)
        assert steps.hits[request.request_id] == 0
        steps.expect(request.request_id)
        expect_nothing_is_held(client, steps)


@pytest.mark.parametrize("is_asynchronous", [False, True], ids=["in one step", "a step ahead"])
def test_requests_that_share_a_history_store_right_numbers(
    daemon: DaemonProcess, client: Client, model: NumberedModel, is_asynchronous: bool, tokens: list[int]
) -> None:
    with Steps(grouped(daemon, model, step_tokens=2000, is_asynchronous=is_asynchronous)) as steps:
        ids = [steps.add([*tokens, number], 150) for number in range(4)]
        steps.run()
        for request_id in ids:
            steps.expect(request_id)
        steps.forget_pages()
        until(lambda: expect_right_numbers(client, steps, tokens) == len(tokens))
        for request_id in ids:
            expect_right_numbers(client, steps, list(steps.requests[request_id].all_token_ids))
        expect_nothing_is_held(client, steps)


@pytest.mark.fast
def test_pages_of_a_step_before_one_whose_orders_failed_are_not_saved(
    daemon: DaemonProcess, client: Client, model: NumberedModel, tokens: list[int]
) -> None:
    """They are other tokens' by now: an error in a hook costs a save, and never stores wrong bytes."""
    with Steps(grouped(daemon, model, pages=100)) as steps:
        role, manager = steps.scheduler.connector._scheduler, steps.scheduler.kv_cache_manager
        orders_of_step = role.orders_of_step

        def fail(scheduled: Any) -> None:
            raise RuntimeError("not expected")

        request = steps.requests[steps.add(tokens[: 3 * BLOCK - 20], 400)]
        steps.until(lambda: request.num_computed_tokens == 3 * BLOCK)  # Saved in the next step.
        role.orders_of_step = fail
        steps.until(lambda: request.num_computed_tokens == 3 * BLOCK + WINDOW + 4)  # The window has left its block.
        others: list[str] = []
        while manager.block_pool.get_num_free_blocks() > 20:
            others.append(steps.add(prompt(f"{tokens[0]} {len(others)}", BLOCK), 400))
            steps.step()
        role.orders_of_step = orders_of_step
        steps.step()
        for other in others:
            steps.abort(other)
        steps.run(request.request_id)
        steps.expect(request.request_id)
        steps.settle()
        expect_right_numbers(client, steps, list(request.all_token_ids), with_partial=True)
        expect_nothing_is_held(client, steps)
