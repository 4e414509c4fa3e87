"""KVService's connector under vLLM's real scheduler: every way in which a request's history is loaded, or is not."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
from vllm.v1.request import RequestStatus

from kvservice_adapter.connectors.vllm.request_keys import salt_of
from kvservice_client import BlockCache, BlockChain, Client, block_chain
from tests.daemon import MIB, DaemonProcess, until
from tests.integration.media import arena
from tests.vllm.contract.numbers import NumberedModel, states_of
from tests.vllm.contract.setup import Setup
from tests.vllm.contract.steps import Steps
from tests.vllm.contract.worker import Runner

pytestmark = pytest.mark.fast

BLOCK = 64
PAGE = 32
BEFORE_FORWARD = ["whole", "layers"]
LOADS = [*BEFORE_FORWARD, "between_steps"]
# Each load and each runner. What fails a load, and what a hit computes, is tried with all of both.
SOME_WAYS = [("whole", Runner.V1), ("layers", Runner.V2), ("between_steps", Runner.V2)]

_MODEL = NumberedModel()


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


@pytest.fixture(params=LOADS)
def load(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def tokens(request: pytest.FixtureRequest) -> list[int]:
    """A prompt of the test's own."""
    return prompt(request.node.nodeid, 6 * BLOCK)


def prompt(seed: str, count: int) -> list[int]:
    chooser = random.Random(seed)
    return [chooser.randrange(1000) for _ in range(count)]


def ours(daemon: DaemonProcess, load: str = "whole", **more: Any) -> Setup:
    """An engine with our connector, on a daemon that is near and may be slow."""
    options = {
        "address": daemon.address,
        "model_id": "numbers",
        "model_revision": "1",
        "block_tokens": BLOCK,
        "load": load,
        "lookup_wait_s": 5.0,
        "wait_s": 5.0,
        **more.pop("options", {}),
    }
    return Setup("KVServiceConnector", "kvservice_adapter.connectors.vllm", options, **more)


def blocks_of(client: Client, steps: Steps) -> BlockCache:
    return client.open_layout(steps.scheduler.connector._scheduler.layout)


def chain_of(steps: Steps, tokens: list[int], *, with_partial: bool = False) -> BlockChain:
    """The keys of a request without a salt, in the generation of keys that the last reset began."""
    scheduler = steps.scheduler.connector._scheduler
    request = next(iter(steps.requests.values()))
    return block_chain(
        scheduler.layout, tokens, salt=salt_of(request, scheduler._generation.number), with_partial=with_partial
    )


def store(client: Client, steps: Steps, tokens: list[int]) -> None:
    """Have the engine compute and save whole blocks, and forget its own pages."""
    request = steps.ask(tokens)
    steps.expect(request.request_id)
    steps.forget_pages()
    blocks = blocks_of(client, steps)
    chain = chain_of(steps, tokens)
    until(lambda: blocks.contains(chain) == len(chain))


def expect_nothing_is_held(client: Client, steps: Steps) -> None:
    """No page in vLLM, and no lease or ticket in the daemon."""
    steps.expect_nothing_is_held()
    until(lambda: client.admin.status().leases == 0)
    until(lambda: not any(block.leases for block in client.admin.list_blocks()))


@pytest.mark.parametrize("runner", Runner)
def test_a_hit_has_the_numbers_of_a_computation(
    daemon: DaemonProcess, client: Client, load: str, runner: Runner, tokens: list[int]
) -> None:
    with Steps(ours(daemon, load), runner) as steps:
        store(client, steps, tokens)
        request = steps.ask([*tokens, *range(50)], 40)
        steps.expect(request.request_id)
        assert steps.hits[request.request_id] == len(tokens)
        assert not steps.bad_pages
        expect_nothing_is_held(client, steps)


def expect_right_numbers(client: Client, steps: Steps, tokens: list[int], *, with_partial: bool = False) -> int:
    """What is stored of the tokens are the numbers of the model. Returns how many tokens are stored."""
    blocks = blocks_of(client, steps)
    with blocks.lookup(chain_of(steps, tokens, with_partial=with_partial)) as lease:
        for layer in lease.load() if lease.hit_blocks else ():
            arrays = blocks.layer_arrays(layer.data, lease.token_counts, layer=layer.index)
            for (keys, values), first in zip(arrays, range(0, lease.hit_tokens, BLOCK), strict=True):
                known = steps.setup.model.keys_and_values(states_of(tokens)[first : first + BLOCK], layer.index)
                assert (keys == known[0].transpose(1, 0, 2)).all()
                assert (values == known[1].transpose(1, 0, 2)).all()
        return lease.hit_tokens


def test_what_is_stored_are_the_numbers_of_the_model(daemon: DaemonProcess, client: Client, tokens: list[int]) -> None:
    with Steps(ours(daemon)) as steps:
        store(client, steps, tokens)
        assert expect_right_numbers(client, steps, tokens) == len(tokens)


@pytest.mark.parametrize("is_asynchronous", [False, True], ids=["in one step", "a step ahead"])
@pytest.mark.parametrize("runner", Runner)
def test_pages_that_a_step_still_computes_are_not_saved_for_a_request_that_shares_them(
    daemon: DaemonProcess, client: Client, runner: Runner, is_asynchronous: bool, tokens: list[int]
) -> None:
    """vLLM gives the second request the pages of the first before a forward has written them."""
    with Steps(ours(daemon, step_tokens=2000, is_asynchronous=is_asynchronous), runner) as steps:
        ids = [steps.add([*tokens, number], 8) for number in range(5)]
        steps.step()
        assert steps.orders.saves == []
        steps.run()
        for request_id in ids:
            steps.expect(request_id)
        assert steps.own_hits[ids[1]] == len(tokens)
        steps.forget_pages()
        until(lambda: expect_right_numbers(client, steps, tokens) == len(tokens))
        expect_nothing_is_held(client, steps)


def three_that_fail_together(daemon: DaemonProcess, client: Client, steps: Steps, tokens: list[int]) -> list[str]:
    """Requests that are scheduled in one step, and whose stored prompt is damaged."""
    store(client, steps, tokens)
    damage(daemon, tokens, 1)
    for pages in steps.worker.pages.values():
        pages.fill_(0.5)  # Freed pages still had the right numbers.
    steps.scheduler.scheduler_config.long_prefill_token_threshold = 50  # Others run beside a long computation.
    ids = [steps.add([*tokens, number], 20) for number in range(3)]
    for state in steps.scheduler.connector._scheduler._requests.values():
        assert state.lookup.wait(60.0)
    return ids


@pytest.mark.parametrize("load", BEFORE_FORWARD)
@pytest.mark.parametrize("runner", Runner)
def test_nothing_is_saved_of_requests_that_share_pages_of_a_failed_load(
    daemon: DaemonProcess, client: Client, load: str, runner: Runner, tokens: list[int]
) -> None:
    """They continue before vLLM has computed all of the pages again, in several steps: their KV may be wrong."""
    with Steps(ours(daemon, load, step_tokens=2000), runner) as steps:
        ids = three_that_fail_together(daemon, client, steps, tokens)
        steps.worker.checks_pages = False
        saved: list[str] = []

        def have_ended() -> bool:
            saved.extend(order.request_id for order in steps.orders.saves)
            return all(steps.requests[each].is_finished() for each in ids)

        steps.until(have_ended)
        steps.step()
        have_ended()
        assert steps.bad_pages
        assert set(saved) == {ids[0]}, "only of the request that computes them again"
        expect_nothing_is_held(client, steps)


@pytest.mark.parametrize("runner", Runner)
def test_requests_whose_loads_between_steps_fail_share_no_page(
    daemon: DaemonProcess, client: Client, runner: Runner, tokens: list[int]
) -> None:
    with Steps(ours(daemon, "between_steps", step_tokens=2000), runner) as steps:
        ids = three_that_fail_together(daemon, client, steps, tokens)
        steps.run()
        assert steps.bad_pages
        for request_id in ids:
            steps.expect(request_id)
        expect_nothing_is_held(client, steps)


@pytest.mark.parametrize(("load", "runner"), SOME_WAYS)
def test_a_miss_is_computed(
    daemon: DaemonProcess, client: Client, load: str, runner: Runner, tokens: list[int]
) -> None:
    with Steps(ours(daemon, load), runner) as steps:
        request = steps.ask(tokens, 10)
        steps.expect(request.request_id)
        assert steps.hits[request.request_id] == 0
        expect_nothing_is_held(client, steps)


def test_a_hit_ends_with_the_last_block_that_the_prompts_share(
    daemon: DaemonProcess, client: Client, load: str, tokens: list[int]
) -> None:
    with Steps(ours(daemon, load)) as steps:
        store(client, steps, tokens)
        request = steps.ask([*tokens[: 2 * BLOCK], 1, 2, 3, *tokens[2 * BLOCK :]], 10)
        steps.expect(request.request_id)
        assert steps.hits[request.request_id] == 2 * BLOCK
        expect_nothing_is_held(client, steps)


def test_all_but_one_token_of_a_stored_prompt_is_loaded(
    daemon: DaemonProcess, client: Client, load: str, tokens: list[int]
) -> None:
    """vLLM needs a token to compute: the last one, in a page whose other tokens are loaded."""
    with Steps(ours(daemon, load)) as steps:
        store(client, steps, tokens)
        request = steps.ask(tokens, 10)
        steps.expect(request.request_id)
        assert steps.hits[request.request_id] == len(tokens) - 1
        expect_nothing_is_held(client, steps)


def test_pages_that_are_vllms_own_are_not_written(
    daemon: DaemonProcess, client: Client, load: str, tokens: list[int]
) -> None:
    own = 3  # Pages, which end inside a block.
    with Steps(ours(daemon, load)) as steps:
        store(client, steps, tokens)
        kept = steps.add(tokens[: own * PAGE], 1000)
        steps.until(lambda: steps.requests[kept].num_output_tokens > 0)
        page_ids = steps.scheduler.kv_cache_manager.get_block_ids(kept)[0][:own]
        for pages in steps.worker.pages.values():
            pages[page_ids] += 0.5  # So that a copy of the same numbers shows.
        changed = [pages[page_ids].clone() for pages in steps.worker.pages.values()]
        steps.worker.unchecked_pages.update(page_ids)
        request = steps.ask(tokens)
        assert steps.hits[request.request_id] == len(tokens) - 1 - own * PAGE
        for pages, before in zip(steps.worker.pages.values(), changed, strict=True):
            assert (pages[page_ids] == before).all()
        steps.abort(kept)
        expect_nothing_is_held(client, steps)


def test_a_hit_and_what_is_left_are_computed_in_chunks(
    daemon: DaemonProcess, client: Client, load: str, tokens: list[int]
) -> None:
    with Steps(ours(daemon, load, step_tokens=50)) as steps:
        store(client, steps, tokens)
        request = steps.ask([*tokens, *prompt("more", 170)], 10)
        steps.expect(request.request_id)
        assert steps.hits[request.request_id] == len(tokens)
        whole = [*tokens, *prompt("more", 170)]
        steps.forget_pages()
        blocks = blocks_of(client, steps)
        chain = chain_of(steps, whole)
        until(lambda: blocks.contains(chain) == len(chain))
        again = steps.ask(whole, 10)
        steps.expect(again.request_id)
        assert steps.hits[again.request_id] >= len(whole) // BLOCK * BLOCK
        expect_nothing_is_held(client, steps)


@pytest.mark.parametrize(("load", "runner"), SOME_WAYS)
def test_requests_that_were_preempted_continue_with_what_they_saved(
    daemon: DaemonProcess, client: Client, load: str, runner: Runner, tokens: list[int]
) -> None:
    with Steps(ours(daemon, load, pages=24), runner) as steps:
        ids = [steps.add(prompt(f"{tokens[0]} {number}", 3 * BLOCK), 200) for number in range(3)]
        steps.run()
        for request_id in ids:
            steps.expect(request_id)
        assert sum(request.num_preemptions for request in steps.requests.values()) > 0
        assert not steps.bad_pages
        expect_nothing_is_held(client, steps)


@pytest.mark.parametrize("runner", Runner)
def test_an_abort_during_a_load_leaves_nothing_behind(
    daemon: DaemonProcess, client: Client, runner: Runner, tokens: list[int]
) -> None:
    with Steps(ours(daemon, "between_steps"), runner) as steps:
        store(client, steps, tokens)
        request = steps.requests[steps.add(tokens)]
        steps.until(lambda: request.status is RequestStatus.WAITING_FOR_REMOTE_KVS)
        steps.abort(request.request_id)
        expect_nothing_is_held(client, steps)
        again = steps.ask(tokens, 10)
        steps.expect(again.request_id)
        assert steps.hits[again.request_id] == len(tokens) - 1


@pytest.mark.parametrize("when", ["queued", "scheduled"])
def test_an_abort_before_a_load_leaves_nothing_behind(
    daemon: DaemonProcess, client: Client, load: str, when: str, tokens: list[int]
) -> None:
    with Steps(ours(daemon, load)) as steps:
        store(client, steps, tokens)
        request_id = steps.add(tokens, 10)
        if when == "scheduled":
            steps.step(lambda: steps.abort(request_id))
        else:
            steps.abort(request_id)
        expect_nothing_is_held(client, steps)


@pytest.mark.parametrize("damaged", [0, 2], ids=["the first block", "a later block"])
@pytest.mark.parametrize("runner", Runner)
def test_a_load_that_fails_is_computed_once(
    daemon: DaemonProcess, client: Client, load: str, runner: Runner, damaged: int, tokens: list[int]
) -> None:
    with Steps(ours(daemon, load), runner) as steps:
        store(client, steps, tokens)
        damage(daemon, tokens, damaged)
        request = steps.ask(tokens, 10)
        steps.expect(request.request_id)
        assert steps.bad_pages
        assert len(steps.bad_pages) == len(set(steps.bad_pages))  # No page twice: the load was tried once.
        # What is before the damaged block is loaded, and only the rest is computed.
        assert len(steps.bad_pages) == -(-(len(tokens) - 1) // PAGE) - damaged * BLOCK // PAGE
        expect_nothing_is_held(client, steps)
        steps.forget_pages()
        again = steps.ask(tokens, 10)  # The damaged block has been stored again.
        steps.expect(again.request_id)


@pytest.mark.parametrize(("load", "runner"), SOME_WAYS)
def test_a_daemon_that_is_killed_before_a_load_costs_a_computation(
    tmp_path: Any, load: str, runner: Runner, tokens: list[int]
) -> None:
    with DaemonProcess(tmp_path) as own, own.client() as client, Steps(ours(own, load), runner) as steps:
        store(client, steps, tokens)
        request = steps.requests[steps.add(tokens, 10)]

        def kill_once_it_is_scheduled() -> None:
            if request.status is not RequestStatus.WAITING:
                own.kill()

        while request.status is RequestStatus.WAITING:  # The daemon has not answered yet.
            steps.step(kill_once_it_is_scheduled)
        steps.run()
        steps.expect(request.request_id)
        assert steps.bad_pages
        steps.expect_nothing_is_held()


@pytest.mark.parametrize(("load", "runner"), SOME_WAYS)
def test_after_a_reset_of_the_connectors_cache_nothing_older_is_found(
    daemon: DaemonProcess, client: Client, load: str, runner: Runner, tokens: list[int]
) -> None:
    with Steps(ours(daemon, load), runner) as steps:
        store(client, steps, tokens)
        assert steps.scheduler.reset_prefix_cache(reset_connector=True)
        request = steps.ask(tokens, 10)
        steps.expect(request.request_id)
        assert steps.hits[request.request_id] == 0
        steps.forget_pages()

        def found() -> bool:
            again = steps.ask(tokens, 10)
            steps.expect(again.request_id)
            steps.forget_pages()
            return steps.hits[again.request_id] == len(tokens) - 1

        until(found)
        expect_nothing_is_held(client, steps)


def damage(daemon: DaemonProcess, tokens: list[int], block: int, model: NumberedModel = _MODEL) -> None:
    """Flip a bit of a stored block, in its last layer."""
    states = states_of(tokens)[block * BLOCK : (block + 1) * BLOCK]
    keys, _ = model.keys_and_values(states, model.layers - 1)
    medium = arena(daemon)
    medium.flip(medium.find(keys.transpose(1, 0, 2).tobytes()) + 5, 0)


@pytest.mark.parametrize("runner", Runner)
def test_a_load_that_fails_costs_no_other_request_its_tokens(
    daemon: DaemonProcess, client: Client, load: str, runner: Runner, tokens: list[int]
) -> None:
    """One other request runs, one loads another history, and one has the same prompt as the request that fails."""
    other = prompt(f"{tokens[0]} other", 4 * BLOCK)
    with Steps(ours(daemon, load, step_tokens=2000), runner) as steps:
        store(client, steps, tokens)
        store(client, steps, other)
        running = steps.add(prompt(f"{tokens[0]} running", 100), 60)
        steps.step()
        damage(daemon, tokens, 1)
        ids = [running, steps.add(tokens, 20), steps.add(other, 20), steps.add([*tokens, 5], 20)]
        steps.run()
        for request_id in ids:
            steps.expect(request_id)
        assert steps.hits[ids[2]] == len(other) - 1
        assert steps.bad_pages
        expect_nothing_is_held(client, steps)


def test_with_the_policy_fail_vllm_ends_the_request_and_frees_its_pages(
    daemon: DaemonProcess, client: Client, load: str, tokens: list[int]
) -> None:
    with Steps(ours(daemon, load, failure_policy="fail")) as steps:
        store(client, steps, tokens)
        damage(daemon, tokens, 1)
        request = steps.ask(tokens, 10)
        assert request.status is RequestStatus.FINISHED_ERROR
        expect_nothing_is_held(client, steps)


def test_a_reset_under_running_requests_computes_them_again(
    daemon: DaemonProcess, client: Client, load: str, tokens: list[int]
) -> None:
    with Steps(ours(daemon, load)) as steps:
        ids = [steps.add(prompt(f"{tokens[0]} {number}", 3 * BLOCK), 100) for number in range(3)]
        steps.until(lambda: all(steps.requests[each].num_output_tokens > 20 for each in ids))
        assert steps.scheduler.reset_prefix_cache(reset_running_requests=True, reset_connector=True)
        steps.run()
        for request_id in ids:
            steps.expect(request_id)
        expect_nothing_is_held(client, steps)


@pytest.mark.parametrize(("transport", "page_tokens"), [("shm", 32), ("grpc", 64), ("shm", 128)])
def test_pages_of_any_size_hold_blocks_of_any_size(
    daemon: DaemonProcess, client: Client, load: str, transport: str, page_tokens: int, tokens: list[int]
) -> None:
    """Blocks of 96 tokens begin and end inside pages."""
    options = {"transport": transport, "block_tokens": 96}
    with Steps(ours(daemon, load, page_tokens=page_tokens, options=options)) as steps:
        store(client, steps, tokens)
        request = steps.ask([*tokens, *range(50)], 40)
        steps.expect(request.request_id)
        assert steps.hits[request.request_id] == len(tokens)
        assert not steps.bad_pages
        expect_nothing_is_held(client, steps)


@pytest.mark.parametrize(("load", "runner"), SOME_WAYS)
def test_a_step_that_is_scheduled_before_the_last_ones_tokens_are_known_stores_only_known_tokens(
    daemon: DaemonProcess, client: Client, load: str, runner: Runner, tokens: list[int]
) -> None:
    with Steps(ours(daemon, load, pages=30, is_asynchronous=True), runner) as steps:
        store(client, steps, tokens)
        ids = [steps.add([*tokens, number], 150) for number in range(3)]
        steps.run()
        for request_id in ids:
            steps.expect(request_id)
            request = steps.requests[request_id]
            steps.forget_pages()
            again = steps.ask(list(request.all_token_ids), 10)  # Its answer is in the store, and is read back.
            steps.expect(again.request_id)
            assert steps.hits[again.request_id] > len(tokens) + BLOCK
        assert not steps.bad_pages
        expect_nothing_is_held(client, steps)


@pytest.mark.parametrize("runner", Runner)
def test_layers_that_no_forward_waited_for_are_reported_in_their_step(
    daemon: DaemonProcess, client: Client, runner: Runner, tokens: list[int]
) -> None:
    """vLLM gives the pages to others after the step: a copy that ends later would write into them."""
    with Steps(ours(daemon, "layers", step_tokens=2000), runner) as steps:
        store(client, steps, tokens)
        for pages in steps.worker.pages.values():
            pages.fill_(0.5)  # Freed pages still had the right numbers.
        attend = steps.worker._attention
        waited: list[str] = []

        def first_layer_alone(layer_name: str) -> None:
            waited.append(layer_name)
            (attend if len(waited) == 1 else steps.worker._attend)(layer_name)

        steps.worker._attention = first_layer_alone
        request = steps.requests[steps.add(tokens, 10)]
        steps.until(lambda: bool(waited))
        assert steps.bad_pages, "vLLM must compute them in the same step's end"
        steps.worker._attention = attend
        steps.run(request.request_id)
        steps.expect(request.request_id)
        expect_nothing_is_held(client, steps)
