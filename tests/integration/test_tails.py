"""Histories without a session: a lookup of more tokens finds them to their last token, whole blocks and partial one."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from kvservice_api.errors import DeadlineExceeded, InvalidRequest
from kvservice_client import BlockChain, ChainBuilder, Client, Durability, Shard, block_chain
from tests.daemon import SOON_S, DaemonProcess, until
from tests.distant_daemon import ANSWER_S
from tests.integration.known_blocks import SMALL, compare, layers_of, save
from tests.integration.test_rebuilt_index import lose_index, rebuild

BLOCK = SMALL.block_tokens
_seeds = itertools.count()


@pytest.fixture(params=["shm", "grpc"])
def client(daemon: DaemonProcess, request: pytest.FixtureRequest) -> Iterator[Client]:
    with daemon.client(transport=request.param) as client:
        yield client


def some_tokens(count: int) -> list[int]:
    """Tokens with which no other history begins."""
    tokens: list[int] = np.random.default_rng(next(_seeds)).integers(0, 50_000, count).tolist()
    return tokens


def history(tokens: Sequence[int], salt: bytes = b"") -> BlockChain:
    return block_chain(SMALL, tokens, with_partial=True, salt=salt)


def builder(tokens: Sequence[int], salt: bytes = b"") -> ChainBuilder:
    made = ChainBuilder(SMALL, salt=salt)
    made.extend(tokens)
    return made


def found(client: Client, tokens: Sequence[int], salt: bytes = b"") -> int:
    """How many of the tokens a lookup leases; their bytes are right."""
    with client.open_layout(SMALL).lookup(builder(tokens, salt)) as lease:
        if lease.hit_blocks:
            compare(lease, SMALL, history(tokens[: lease.hit_tokens], salt))
        return lease.hit_tokens


def heads_of(data: NDArray[np.uint8], shard: Shard) -> NDArray[np.uint8]:
    """The shard's heads of one slice: K, then V."""
    return data.reshape(2, SMALL.kv_heads, -1)[:, shard.head_begin : shard.head_end].ravel()


@pytest.mark.parametrize("tokens", [5, BLOCK, 2 * BLOCK + 5, 3 * BLOCK - 1])
def test_a_continued_history_is_found_to_its_last_token(client: Client, tokens: int) -> None:
    said = some_tokens(tokens + 40)
    assert save(client, SMALL, history(said[:tokens])).is_complete

    assert found(client, said) == tokens
    assert found(client, said[:tokens]) == tokens, "and also one that was not continued"


def test_each_turn_finds_the_turn_before(client: Client) -> None:
    said = some_tokens(4 * BLOCK)
    stored = 0
    for end in (7, 12, BLOCK, BLOCK + 3, 2 * BLOCK + 9, 2 * BLOCK + 15, 4 * BLOCK):
        assert found(client, said[:end]) == stored
        save(client, SMALL, history(said[:end]))
        stored = end


def test_two_continuations_of_one_history_find_their_own_tails(client: Client) -> None:
    common = some_tokens(BLOCK + 3)
    one, other = common + some_tokens(4), common + some_tokens(7)
    for said in (one, other):
        save(client, SMALL, history(said))

    assert found(client, [*one, 1, 2, 3]) == len(one)
    assert found(client, [*other, 1, 2, 3]) == len(other)
    assert found(client, [*common, 1, 2, 3]) == BLOCK, "no tail has these tokens"


def test_the_longest_tail_is_taken(client: Client) -> None:
    said = some_tokens(3 * BLOCK)
    for end in (BLOCK + 9, BLOCK + 12, BLOCK + 3):
        save(client, SMALL, history(said[:end]))

    assert found(client, said) == BLOCK + 12
    assert found(client, said[: BLOCK + 11]) == BLOCK + 9, "a longer one has tokens that are not asked for"


def test_the_newest_four_tails_are_found(client: Client) -> None:
    common = some_tokens(BLOCK)
    branches = [common + some_tokens(number) for number in range(3, 9)]
    for said in branches:
        save(client, SMALL, history(said))

    assert [found(client, [*said, 1]) - BLOCK for said in branches] == [0, 0, 5, 6, 7, 8]


def test_the_tail_of_a_named_session_is_found_also_if_it_is_not_one_of_the_newest(client: Client) -> None:
    common = some_tokens(BLOCK)
    branches = {f"branch-{next(_seeds)}": common + some_tokens(number) for number in range(3, 9)}
    for session_id, said in branches.items():
        save(client, SMALL, history(said))
        client.session(SMALL, session_id).append(history(said))
    cache = client.open_layout(SMALL)

    def leased(said: Sequence[int], session_id: str) -> int:
        pending = cache.begin_lookup(builder(said), session_id=session_id)
        assert pending.wait(SOON_S)
        lookup = pending.poll()
        assert lookup is not None
        compare(lookup.lease, SMALL, history(said[: lookup.lease.hit_tokens]))
        lookup.lease.release()
        with cache.lookup(builder(said), session_id=session_id) as lease:
            assert lease.hit_tokens == lookup.lease.hit_tokens
        return lease.hit_tokens

    assert [leased([*said, 1], each) - BLOCK for each, said in branches.items()] == [3, 4, 5, 6, 7, 8]
    oldest, another, *_ = branches
    assert leased([*branches[oldest], 1], "there-is-none") == BLOCK
    assert leased([*branches[oldest], 1], another) == BLOCK, "its tokens are others"
    with pytest.raises(InvalidRequest):
        cache.lookup(builder(common), session_id="no session id")


def test_a_tail_is_found_after_the_blocks_behind_it_are_gone(client: Client) -> None:
    said = some_tokens(3 * BLOCK)
    for end in (BLOCK + 5, 3 * BLOCK):
        save(client, SMALL, history(said[:end]))
    assert found(client, said) == 3 * BLOCK
    client.admin.discard(history(said).keys[1:2])

    assert found(client, said) == BLOCK + 5


def test_a_tail_that_is_gone_is_no_hit(client: Client) -> None:
    said = some_tokens(BLOCK + 5)
    save(client, SMALL, history(said))
    client.admin.discard(history(said).keys[1:])

    assert found(client, [*said, 1]) == BLOCK


def test_salts_share_no_tails(client: Client) -> None:
    said = some_tokens(5)
    save(client, SMALL, history(said, b"one"))

    assert found(client, [*said, 1], b"one") == 5
    assert found(client, [*said, 1], b"other") == found(client, [*said, 1]) == 0


def test_all_ranks_find_the_same_history(client: Client) -> None:
    said = some_tokens(2 * BLOCK + 5)
    chain = history(said)
    shards = [Shard(0, SMALL.layers, head, head + 1) for head in range(SMALL.kv_heads)]
    layers = layers_of(SMALL, chain)
    for shard in shards[:2]:
        ranked = client.open_layout(SMALL, shard)
        assert ranked.save(chain, [[heads_of(data, shard) for data in layer] for layer in layers]).is_complete

    for shard, tokens in zip(shards, (len(said), len(said), 0), strict=True):
        with client.open_layout(SMALL, shard).lookup(builder([*said, 1])) as lease:
            assert lease.hit_tokens == tokens
            for layer in lease.load() if tokens else ():
                wanted = [heads_of(data, shard) for data in layers[layer.index]]
                assert np.array_equal(layer.data, np.concatenate(wanted))
    with client.open_layout(SMALL, Shard(0, SMALL.layers, 0, 2)).lookup(builder([*said, 1])) as lease:
        assert lease.hit_tokens == len(said), "two ranks' shards together"
    assert found(client, [*said, 1]) == 0, "the third rank's shard is not stored"


def test_only_one_lease_stays_open(client: Client) -> None:
    said = some_tokens(2 * BLOCK + 5)
    save(client, SMALL, history(said))
    before = client.admin.status().leases

    with client.open_layout(SMALL).lookup(builder([*said, 1])) as lease:
        assert lease.hit_tokens == len(said)
        until(lambda: client.admin.status().leases == before + 1)
    assert client.admin.status().leases == before


def test_a_lookup_in_the_background_finds_the_tail_and_its_ticket_has_it(client: Client) -> None:
    said = some_tokens(2 * BLOCK + 5)
    save(client, SMALL, history(said))
    blocks = client.open_layout(SMALL)

    pending = blocks.begin_lookup(builder([*said, 1]), adoptions=1)
    until(lambda: pending.poll() is not None)
    result = pending.poll()
    assert result is not None and result.lease.hit_tokens == len(said)
    result.lease.release()
    with blocks.adopt(result.ticket) as adopted:
        assert adopted.token_counts == (BLOCK, BLOCK, 5)
        compare(adopted, SMALL, history(said))


def test_a_request_is_explained_by_the_lookup_of_whole_blocks_and_the_lookup_with_the_tail(client: Client) -> None:
    said = some_tokens(3 * BLOCK)
    save(client, SMALL, history(said[: BLOCK + 5]))
    name = f"request {said}"[:100]

    with client.open_layout(SMALL).lookup(builder(said), request_id=name) as lease:
        compare(lease, SMALL, history(said[: BLOCK + 5]))
    whole, with_tail = client.admin.explain_request(name).lookups
    assert (whole.asked_blocks, whole.hit_blocks, whole.miss.key) == (3, 1, history(said).keys[1])
    assert (with_tail.asked_blocks, with_tail.hit_blocks, with_tail.HasField("miss")) == (2, 2, False)
    assert (len(whole.loads), [load.blocks for load in with_tail.loads]) == (0, [2])


def test_a_tail_of_a_session_is_found_without_the_session(client: Client) -> None:
    said = some_tokens(BLOCK + 5)
    save(client, SMALL, history(said))
    client.session(SMALL, f"session-{said[0]}").append(history(said))

    assert found(client, [*said, 1]) == BLOCK + 5


@pytest.mark.parametrize("durability", [Durability.DRAM, Durability.SSD])
def test_tails_are_found_after_the_daemon_was_killed(
    new_daemon: Callable[..., DaemonProcess], durability: Durability
) -> None:
    process = new_daemon()
    said, short = some_tokens(BLOCK + 40), some_tokens(9)
    with process.client() as client:
        for tokens in (said[: BLOCK + 3], said[: BLOCK + 9], short):
            save(client, SMALL, history(tokens), durability)
        process.kill()
        process.start()
        assert found(client, said) == BLOCK + 9
        assert found(client, [*short, 1]) == 9


def test_tails_are_found_after_the_index_was_lost_and_built_again(new_daemon: Callable[..., DaemonProcess]) -> None:
    process, said = new_daemon(), some_tokens(BLOCK + 9)
    with process.client() as client:
        save(client, SMALL, history(said), Durability.SSD)
        process.stop()
        lose_index(process)
        rebuild(process)
        process.start()
        assert found(client, [*said, 1]) == BLOCK + 9


def test_a_builder_without_tokens_has_an_empty_lease(client: Client) -> None:
    with client.open_layout(SMALL).lookup(builder([])) as lease:
        assert (lease.hit_blocks, lease.remaining_s) == (0, 0.0)


def test_a_lookup_whose_time_is_over_before_it_has_leased_the_tail_leaves_no_lease(tmp_path: Path) -> None:
    with (
        DaemonProcess(tmp_path, program=("-m", "tests.distant_daemon")) as daemon,
        daemon.client() as client,
    ):
        said = some_tokens(BLOCK + 5)
        assert save(client, SMALL, history(said)).is_complete
        blocks = client.open_layout(SMALL)
        assert found(client, said) == len(said)
        with pytest.raises(DeadlineExceeded):  # The first answer is there in time, and the second one is not.
            blocks.lookup(builder(said), lease_ttl_s=600.0, timeout_s=1.5 * ANSWER_S)
        until(lambda: client.admin.status().leases == 0)
