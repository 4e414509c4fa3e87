"""Sessions as an engine uses them: it loads what it saved, in order, without the parts that were cut."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

import numpy as np
import pytest
from numpy.typing import NDArray

from kvservice_api.errors import BlockNotFound, InvalidFrame, InvalidRequest, SessionChanged, SessionNotFound
from kvservice_api.keys import BlockChain, block_key
from kvservice_client import BlockCache, Client, Layout, Session, Shard, block_chain
from kvservice_client.session import current
from tests.daemon import DaemonProcess, until
from tests.integration.conversations import layers_of, new_chain, small_layout

LAYOUT = small_layout("sessions")  # 8 tokens per block.


@pytest.fixture
def client(daemon: DaemonProcess) -> Iterator[Client]:
    with daemon.client() as client:
        yield client


Talk = list[list[NDArray[np.generic]]]  # Layer by layer: keys and values as [head, token, dim].


def talk_of(blocks: BlockCache, layers: Sequence[NDArray[np.uint8]], counts: Sequence[int]) -> Talk:
    arrays = [blocks.layer_arrays(layer, counts) for layer in layers]
    return [[np.concatenate(part, axis=1) for part in zip(*layer, strict=True)] for layer in arrays]


def kept(talk: Talk, *keep: tuple[int, int]) -> Talk:
    return [
        [np.concatenate([part[:, first : first + count] for first, count in keep], axis=1) for part in layer]
        for layer in talk
    ]


def same(one: Talk, other: Talk) -> bool:
    return all(np.array_equal(a, b) for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True))


def loaded(session: Session, blocks: BlockCache) -> Talk:
    with session.lookup() as history:
        assert history.tokens == history.state.token_count
        return talk_of(blocks, [layer.data for layer in history.load()], history.token_counts)


def said(client: Client, session_id: str, tokens: int = 20) -> tuple[BlockCache, Session, BlockChain, Talk]:
    """A session of so many tokens, saved."""
    blocks, session = client.open_layout(LAYOUT), client.session(LAYOUT, session_id)
    chain = new_chain(LAYOUT, tokens)
    layers = layers_of(blocks, chain)
    assert blocks.save(chain, layers).stored == len(chain)
    session.append(chain)
    return blocks, session, chain, talk_of(blocks, layers, chain.token_counts)


def test_a_history_comes_back_whole_its_partial_block_too(client: Client) -> None:
    blocks, session, chain, talk = said(client, "whole")

    state = session.get()
    assert (state.revision, state.token_count, state.tail_tokens, state.stored_tokens) == (1, 20, 4, 20)
    assert [each.key for each in state.slices] == list(chain)
    assert [each.stored_position for each in state.slices] == state.read_positions == [0, 8, 16]
    assert same(loaded(session, blocks), talk)


def test_partial_blocks_in_the_middle_load_right(client: Client) -> None:
    """After a cut the chain continues in a new block; the block before it stays partial."""
    blocks, session, _, talk = said(client, "middle")
    cut = session.truncate([(2, 3), (7, 13)], 1)
    parts = [kept(talk, (2, 3), (7, 13))]
    for revision, tokens in ((2, 5), (3, 3), (4, 9)):
        state = session.get()
        tail = [] if not state.tail_tokens else [7] * state.tail_tokens
        chain = chain_from(state.tip, [*tail, *([7] * tokens)])
        layers = layers_of(blocks, chain)
        blocks.save(chain, layers)
        session.append(chain, revision)
        new = talk_of(blocks, layers, chain.token_counts)
        parts = [kept(joined(parts), (0, state.token_count - state.tail_tokens)), new]

    state = session.get()
    assert cut.tip != state.tip
    assert [each.token_count for each in state.slices] == [3, 1, 8, 4, 8, 8, 1]
    assert same(loaded(session, blocks), joined(parts))


def chain_from(parent: bytes, tokens: Sequence[int]) -> BlockChain:
    keys, counts, key = [], [], parent
    for at in range(0, len(tokens), LAYOUT.block_tokens):
        part = tokens[at : at + LAYOUT.block_tokens]
        key = block_key(key, part)
        keys.append(key)
        counts.append(len(part))
    return BlockChain(parent, tuple(keys), tuple(counts))


def joined(parts: list[Talk]) -> Talk:
    return [
        [np.concatenate(pieces, axis=1) for pieces in zip(*layers, strict=True)] for layers in zip(*parts, strict=True)
    ]


def test_a_block_of_several_slices_is_loaded_once(client: Client) -> None:
    blocks, session, _, talk = said(client, "several")
    session.truncate([(0, 1), (2, 1), (4, 1), (18, 2)], 1)

    with session.lookup() as history:
        assert history.token_counts == (1, 1, 1, 2)
        assert history.lease is not None
        assert history.lease.token_counts == (8, 4)
        data = [layer.data for layer in history.load()]
    assert same(talk_of(blocks, data, history.token_counts), kept(talk, (0, 1), (2, 1), (4, 1), (18, 2)))


def test_history_is_usable_up_to_the_first_missing_slice(client: Client) -> None:
    blocks, session, chain, talk = said(client, "missing", tokens=32)
    session.truncate([(0, 4), (9, 4), (17, 4), (25, 7)], 1)
    client.admin.discard([chain.keys[2]])

    state = session.get()
    assert (state.stored_slices, state.stored_tokens) == (2, 8)
    with session.lookup(state) as history:
        assert (history.tokens, history.token_counts) == (8, (4, 4))
        data = [layer.data for layer in history.load()]
    assert same(talk_of(blocks, data, history.token_counts), kept(talk, (0, 4), (9, 4)))

    client.admin.discard([chain.keys[0]])
    with session.lookup() as history:
        assert (history.tokens, history.slices) == (0, ())
        with pytest.raises(BlockNotFound):
            list(history.load())


def test_a_rank_reads_its_part_of_a_session_that_another_changed(client: Client) -> None:
    _, session, _, talk = said(client, "ranks")
    session.truncate([(3, 10)], 1)
    shard = Shard(1, 3, 1, 2)
    part, rank = client.open_layout(LAYOUT, shard), client.session(LAYOUT, "ranks", shard)

    expected = [[keys[1:], values[1:]] for keys, values in kept(talk, (3, 10))[1:3]]
    assert same(loaded(rank, part), expected)


def test_the_session_that_is_in_the_way_travels_with_the_error(client: Client) -> None:
    _, session, chain, _ = said(client, "stale")
    session.truncate([(0, 8)], 1)

    with pytest.raises(SessionChanged, match="revision 2") as caught:
        session.append(chain[1:], 1)
    now = current(caught.value)
    assert now is not None
    assert (now.revision, now.cuts, now.token_count) == (2, 1, 8)
    assert [each.key for each in now.slices] == [chain.keys[0]]


def test_a_fork_goes_its_own_way(client: Client) -> None:
    blocks, session, _, talk = said(client, "trunk")
    branch, state = session.fork("branch")
    assert (state.session_id, state.revision) == ("branch", 1)

    branch.truncate([(16, 4)], 1)
    assert same(loaded(session, blocks), talk)
    assert same(loaded(branch, blocks), kept(talk, (16, 4)))
    assert session.end()
    assert not session.end()
    with pytest.raises(SessionNotFound):
        session.get()
    assert same(loaded(branch, blocks), kept(talk, (16, 4)))


def test_a_daemon_that_was_killed_has_the_session_and_its_tail(new_daemon: Callable[..., DaemonProcess]) -> None:
    daemon = new_daemon()
    with daemon.client() as client:
        blocks, session, _, talk = said(client, "killed")
        session.truncate([(1, 2), (10, 10)], 1)
        daemon.kill()
        daemon.start()

        assert same(loaded(session, blocks), kept(talk, (1, 2), (10, 10)))
    daemon.stop()
    done = daemon.check()
    assert done.returncode == 0, done.stdout


def test_wrong_token_counts_give_no_bytes(client: Client) -> None:
    """With a wrong token count for a block, a client gets an error and no bytes of another block."""
    blocks, _, chain, _ = said(client, "lie")
    with blocks.lookup(BlockChain(chain.parent, chain.keys, (8, 7, 4))) as lease, pytest.raises(InvalidFrame):
        list(lease.load())
    lie = client.session(LAYOUT, "lie-2")
    lie.append(BlockChain(chain.parent, chain.keys, (8, 8, 5)))
    assert lie.get().stored_slices == 2
    with lie.lookup() as history:
        assert history.token_counts == (8, 8)


def test_a_history_with_partial_blocks_in_the_middle_is_no_chain_to_save(client: Client) -> None:
    blocks = client.open_layout(LAYOUT)
    history = BlockChain(bytes(32), (bytes(31) + b"1", bytes(31) + b"2"), (5, 8))

    with pytest.raises(InvalidRequest, match="only the last block"):
        blocks.save(history, [np.zeros(blocks.slice_bytes(13), np.uint8)] * LAYOUT.layers)


def test_an_append_whose_answer_was_lost_is_recognized(daemon: DaemonProcess, client: Client) -> None:
    chain = block_chain(LAYOUT, range(500, 520), with_partial=True)
    way = broken_once(daemon.port)
    with way as (port, break_it), Client(f"127.0.0.1:{port}", timeout_s=20, reconnect_wait_s=15) as far:
        session = far.session(LAYOUT, "lost")
        session.end()  # The client is connected, and the layout is open.
        answers_held = break_it()
        done: list[int] = []
        worker = threading.Thread(target=lambda: done.append(session.append(chain).revision))
        worker.start()
        until(lambda: bool(list(client.admin.list_sessions("lost"))))
        answers_held.set()
        worker.join(60)
    assert done == [1]
    assert client.session(LAYOUT, "lost").get().revision == 1


@contextmanager
def broken_once(port: int) -> Iterator[tuple[int, Callable[[], threading.Event]]]:
    """A proxy to the daemon that can lose an answer and then breaks the connection; the next connection works."""
    listener = socket.create_server(("127.0.0.1", 0))
    losing, lost = threading.Event(), threading.Event()
    open_sockets: list[socket.socket] = []

    def pump(source: socket.socket, target: socket.socket, answers: bool) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                if not (answers and losing.is_set()):
                    target.sendall(data)
        for each in (source, target):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def serve() -> None:
        with suppress(OSError):
            while True:
                near, _ = listener.accept()
                far = socket.create_connection(("127.0.0.1", port))
                open_sockets.extend((near, far))
                for source, target, answers in ((near, far, False), (far, near, True)):
                    threading.Thread(target=pump, args=(source, target, answers), daemon=True).start()

    def break_it() -> threading.Event:
        losing.set()
        threading.Thread(target=cut, daemon=True).start()
        return lost

    def cut() -> None:
        lost.wait()
        losing.clear()
        for each in open_sockets[:2]:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield listener.getsockname()[1], break_it
    finally:
        listener.close()
        for each in open_sockets:
            each.close()


def test_layouts_of_one_session_id_are_several_sessions(client: Client) -> None:
    other = Layout("another", "int8", layers=1, kv_heads=1, k_head_dim=4, v_head_dim=4, block_tokens=8)
    said(client, "shared")

    with pytest.raises(SessionNotFound):
        client.session(other, "shared").get()
    client.session(other, "shared").append(block_chain(other, range(8)))
    assert len(list(client.admin.list_sessions("shared"))) == 2
