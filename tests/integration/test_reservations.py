"""Saves that the caller writes in place: reserved, written, sealed, and committed or abandoned."""

from __future__ import annotations

import gc
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from kvservice_api.errors import (
    DaemonUnavailable,
    DeadlineExceeded,
    InvalidRequest,
    KVError,
    NotShared,
    Overloaded,
    ReservationEnded,
    TierFull,
)
from kvservice_client import BlockChain, Client, Durability, Layout, Reservation, Shard, block_chain
from tests.daemon import MIB, NEVER_S, SOON_S, DaemonProcess, until
from tests.forking import in_child
from tests.integration.known_blocks import LARGE, SMALL, layers_of, new_chain, save, slice_of, tiers_of, verify


@pytest.fixture
def client(daemon: DaemonProcess) -> Iterator[Client]:
    with daemon.client() as client:
        yield client


def write(reservation: Reservation, layout: Layout, chains: Sequence[BlockChain]) -> None:
    """Every reserved block, layer by layer."""
    for layer in range(layout.layers):
        for (chain, block), target in zip(reservation.blocks, reservation.slices(layer), strict=True):
            np.copyto(target, slice_of(chains[chain].keys[block], layer, target.size))
        reservation.seal(layer)


@pytest.mark.parametrize("layout", [SMALL, LARGE], ids=["small slices", "large slices"])
@pytest.mark.parametrize("durability", list(Durability))
def test_what_is_written_in_place_is_stored_bit_for_bit(client: Client, layout: Layout, durability: Durability) -> None:
    chains = [new_chain(layout, 3), new_chain(layout, 1), new_chain(layout, 4)[2:]]
    save(client, layout, chains[0][:1])
    blocks = client.open_layout(layout)
    before = client.stats()

    with blocks.reserve(chains, durability) as reservation:
        assert reservation.blocks == [(0, 1), (0, 2), (1, 0), (2, 0), (2, 1)]
        write(reservation, layout, chains)
        assert blocks.contains(chains[1]) == 0, "no other client sees a block before its commit"
        results = reservation.commit()

    assert [(each.stored, each.already_stored, each.refused) for each in results] == [
        (2, 1, []),
        (1, 0, []),
        (2, 0, []),
    ]
    for chain in chains:
        verify(client, layout, chain)
    if durability is Durability.SSD:
        assert tiers_of(client, layout, chains[1]) == ["dram+ssd"]
    counted = client.stats().transports["shm"]
    assert counted.saves - before.transports["shm"].saves == 1
    assert counted.saved_bytes - before.transports["shm"].saved_bytes == reservation.size_bytes
    assert client.admin.status().uploads == 0


def test_a_block_of_two_chains_is_written_once(client: Client) -> None:
    whole = new_chain(SMALL, 3)
    chains = [whole[:2], whole[1:], whole]
    with client.open_layout(SMALL).reserve(chains) as reservation:
        assert reservation.blocks == [(0, 0), (0, 1), (1, 1)]
        write(reservation, SMALL, chains)
        results = reservation.commit()
    assert [(each.stored, each.already_stored) for each in results] == [(2, 0), (1, 1), (0, 3)]
    verify(client, SMALL, whole)


def test_a_rank_writes_its_heads(client: Client) -> None:
    chain, shards = new_chain(SMALL, 2), (Shard(0, 5, 0, 1), Shard(0, 5, 1, 3))
    for shard in shards:
        with client.open_layout(SMALL, shard).reserve([chain]) as reservation:
            for layer in range(SMALL.layers):
                for (_, block), target in zip(reservation.blocks, reservation.slices(layer), strict=True):
                    whole = slice_of(chain.keys[block], layer, SMALL.slice_bytes(3, SMALL.block_tokens))
                    heads = whole.reshape(2, SMALL.kv_heads, -1)[:, shard.head_begin : shard.head_end]
                    np.copyto(target, heads.reshape(-1))
                reservation.seal(layer)
            (result,) = reservation.commit()
        assert result.stored == 2
    verify(client, SMALL, chain)


def test_a_partial_last_block_is_written_in_place(client: Client) -> None:
    layout = Layout("partial", "uint8", layers=2, kv_heads=1, k_head_dim=8, v_head_dim=8, block_tokens=16)
    chains = [block_chain(layout, np.arange(start, start + 21), with_partial=True) for start in (0, 100)]
    blocks = client.open_layout(layout)
    with blocks.reserve(chains) as reservation:
        sizes = [each.size for each in reservation.slices(0)]
        for layer in range(layout.layers):
            for number, target in enumerate(reservation.slices(layer)):
                target[:] = 10 * layer + number
            reservation.seal(layer)
        assert all(each.is_complete for each in reservation.commit())
    assert sizes == [256, 80, 256, 80]
    with blocks.lookup(chains[1]) as lease:
        loaded = [layer.data.tolist() for layer in lease.load()]
    assert loaded == [[10 * layer + 2] * 256 + [10 * layer + 3] * 80 for layer in range(layout.layers)]


def test_a_layer_that_is_not_sealed_is_not_committed(client: Client) -> None:
    chains = [new_chain(SMALL, 1)]
    reservation = client.open_layout(SMALL).reserve(chains)
    write(reservation, SMALL, chains)
    reservation.abandon()
    reservation = client.open_layout(SMALL).reserve(chains)
    for layer in range(SMALL.layers - 1):
        reservation.seal(layer)
    with pytest.raises(InvalidRequest, match="layer 4 is not sealed"):
        reservation.commit()
    write(reservation, SMALL, chains)  # It continues.
    assert reservation.commit()[0].stored == 1


def test_slices_may_be_sealed_one_by_one(client: Client) -> None:
    chains = [new_chain(SMALL, 2)]
    reservation = client.open_layout(SMALL).reserve(chains)
    for layer in range(SMALL.layers):
        for number, target in enumerate(reservation.slices(layer)):
            with pytest.raises(InvalidRequest, match=f"layer {layer} is not sealed"):
                reservation.commit()
            np.copyto(target, slice_of(chains[0].keys[number], layer, target.size))
            reservation.seal(layer, number)
    with pytest.raises(InvalidRequest, match="number"):
        reservation.seal(0, 2)
    assert reservation.commit()[0].stored == 2
    verify(client, SMALL, chains[0])
    verify(client, SMALL, chains[0])


def test_bytes_that_change_after_the_seal_are_never_loaded(client: Client) -> None:
    chains = [new_chain(SMALL, 1)]
    reservation = client.open_layout(SMALL).reserve(chains)
    write(reservation, SMALL, chains)
    reservation.slices(2)[0][0] ^= 1
    reservation.commit()
    with client.open_layout(SMALL).lookup(chains[0]) as lease, pytest.raises(KVError):
        list(lease.load())
    assert client.open_layout(SMALL).contains(chains[0]) == 0


def test_another_thread_may_commit(client: Client) -> None:
    chains = [new_chain(SMALL, 2)]
    reservation = client.open_layout(SMALL).reserve(chains)
    write(reservation, SMALL, chains)
    with ThreadPoolExecutor() as threads:
        assert threads.submit(reservation.commit).result()[0].stored == 2
    verify(client, SMALL, chains[0])


def test_an_ended_reservation_gives_nothing(client: Client) -> None:
    chains = [new_chain(SMALL, 1)]
    blocks = client.open_layout(SMALL)
    committed, abandoned = blocks.reserve(chains), blocks.reserve([new_chain(SMALL, 1)])
    write(committed, SMALL, chains)
    committed.commit()
    abandoned.abandon()
    for reservation in (committed, abandoned):
        reservation.abandon()
        with pytest.raises(ReservationEnded, match="reserve again"):
            reservation.slices(0)
        with pytest.raises(ReservationEnded, match="reserve again"):
            reservation.seal(0)
        with pytest.raises(ReservationEnded, match="reserve again"):
            reservation.commit()
    verify(client, SMALL, chains[0])


def test_a_reservation_is_abandoned_with_the_last_reference_to_it_and_to_its_memory(client: Client) -> None:
    blocks = client.open_layout(SMALL)
    reservation = blocks.reserve([new_chain(SMALL, 2)])
    part = reservation.slices(1)[1][10:20]
    del reservation
    gc.collect()
    assert client.admin.status().uploads == 2, "its memory is still in use"
    part[:] = 7
    del part
    gc.collect()
    until(lambda: client.admin.status().uploads == 0)
    with blocks.reserve([new_chain(SMALL, 1)]):
        pass
    until(lambda: client.admin.status().uploads == 0)


def test_what_cannot_be_reserved_is_refused_at_once(daemon: DaemonProcess, client: Client) -> None:
    blocks, chain = client.open_layout(SMALL), new_chain(SMALL, 2)
    for saves, rule in (([], "a chain"), ([chain[:0]], "a block"), ([chain, None], "chain"), (7, "saves")):
        with pytest.raises(InvalidRequest, match=rule):
            blocks.reserve(saves)  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match="at most 256 may be reserved at once"):
        blocks.reserve([new_chain(SMALL, 129), new_chain(SMALL, 128)])
    with pytest.raises(InvalidRequest, match="durability"):
        blocks.reserve([chain], "tape")  # type: ignore[arg-type]
    with blocks.reserve([chain]) as reservation:
        for layer in (-1, SMALL.layers, True, 1.5):
            with pytest.raises(InvalidRequest, match="layer"):
                reservation.slices(layer)  # type: ignore[arg-type]
    with daemon.client(transport="grpc") as other, pytest.raises(NotShared, match="save the blocks"):
        other.open_layout(SMALL).reserve([chain])
    with daemon.client(throttle_bytes_per_s=1e9) as other, pytest.raises(NotShared):
        other.open_layout(SMALL).reserve([chain])


def test_a_daemon_that_lets_no_client_write_refuses_reservations_and_takes_saves(
    new_daemon: Callable[..., DaemonProcess],
) -> None:
    daemon, chain = new_daemon(dram__share="read-only"), new_chain(SMALL, 1)
    with daemon.client() as client:
        with pytest.raises(NotShared):
            client.open_layout(SMALL).reserve([chain])
        assert save(client, SMALL, chain).stored == 1


@pytest.mark.parametrize("transport", ["shm", "grpc"])
def test_a_daemon_that_takes_one_chain_per_save_is_given_one(tmp_path: Path, transport: str) -> None:
    daemon = DaemonProcess(tmp_path, program=("-m", "tests.one_chain_daemon"))
    try:
        daemon.start()
        with daemon.client(transport=transport) as client:
            blocks, whole = client.open_layout(SMALL), new_chain(SMALL, 4)
            chains = [whole[:2], whole[1:], new_chain(SMALL, 1)]
            results = blocks.save_many([(chain, layers_of(SMALL, chain)) for chain in chains])
            assert [(each.stored, each.already_stored) for each in results] == [(2, 0), (2, 1), (1, 0)]
            verify(client, SMALL, whole)
            verify(client, SMALL, chains[2])
            if transport == "shm":
                with pytest.raises(NotShared, match="one chain at a time"):
                    blocks.reserve([new_chain(SMALL, 1), new_chain(SMALL, 1)])
                with blocks.reserve([chain := new_chain(SMALL, 2)]) as reservation:
                    write(reservation, SMALL, [chain])
                    assert reservation.commit()[0].stored == 2
    finally:
        daemon.remove()


def test_a_client_may_hold_so_many_reservations(client: Client) -> None:
    blocks = client.open_layout(SMALL)
    held = [blocks.reserve([new_chain(SMALL, 1)]) for _ in range(64)]
    with pytest.raises(Overloaded, match="64 reservations"):
        blocks.reserve([new_chain(SMALL, 1)])
    for each in held:
        each.abandon()
    until(lambda: client.admin.status().uploads == 0)
    blocks.reserve([new_chain(SMALL, 1)]).abandon()


def test_blocks_that_find_no_space_are_refused_chain_by_chain(new_daemon: Callable[..., DaemonProcess]) -> None:
    daemon = new_daemon(dram__capacity_bytes=12 * MIB, index__volatile_map_bytes=4 * MIB, ssd__capacity_bytes=0)
    chains = [new_chain(LARGE, 20), new_chain(LARGE, 60)]
    with daemon.client() as client, client.open_layout(LARGE).reserve(chains) as reservation:
        write(reservation, LARGE, chains)
        first, second = reservation.commit()
        assert first.stored + second.stored == len(reservation.blocks) > 0
        assert not second.is_complete
        assert {type(error) for _, error in second.refused} == {TierFull}
        verify(client, LARGE, chains[0][: first.stored])


def test_two_clients_of_one_block_write_it_once(daemon: DaemonProcess, client: Client) -> None:
    chains = [new_chain(SMALL, 2)]
    with daemon.client("second") as other, ThreadPoolExecutor() as threads:
        first = client.open_layout(SMALL).reserve(chains)
        waiting = threads.submit(other.open_layout(SMALL).reserve, [*chains, new_chain(SMALL, 1)])
        until(lambda: client.admin.status().uploads == 3)
        write(first, SMALL, chains)
        assert first.commit()[0].stored == 2
        second = waiting.result(SOON_S)
        assert second.blocks == [(1, 0)]
        second.abandon()

        chains = [new_chain(SMALL, 2)]
        first = client.open_layout(SMALL).reserve(chains)
        waiting = threads.submit(other.open_layout(SMALL).reserve, chains)
        first.abandon()
        second = waiting.result(SOON_S)
        assert second.blocks == [(0, 0), (0, 1)]
        write(second, SMALL, chains)
        assert second.commit()[0].stored == 2
    verify(client, SMALL, chains[0])


@pytest.mark.parametrize("when", ["while the daemon is away", "after its restart"])
def test_a_reservation_ends_with_the_daemon_and_the_client_reserves_again(
    new_daemon: Callable[..., DaemonProcess], when: str
) -> None:
    daemon, chains = new_daemon(), [new_chain(SMALL, 2)]
    with daemon.client() as client:
        blocks = client.open_layout(SMALL)
        reservation = blocks.reserve(chains)
        write(reservation, SMALL, chains)
        if when == "while the daemon is away":
            daemon.kill()
            with pytest.raises(DaemonUnavailable):
                reservation.commit(SOON_S)
            daemon.start()
        else:
            daemon.stop()
            daemon.start()
            assert blocks.contains(chains[0]) == 0
            with pytest.raises(ReservationEnded):
                reservation.commit()
        with blocks.reserve(chains) as again:
            write(again, SMALL, chains)
            assert again.commit()[0].stored == 2
        verify(client, SMALL, chains[0])


def test_space_that_is_being_written_while_the_daemon_restarts_is_not_reused(
    new_daemon: Callable[..., DaemonProcess],
) -> None:
    daemon = new_daemon(dram__capacity_bytes=16 * MIB, index__volatile_map_bytes=4 * MIB)
    with daemon.client() as client:
        chains = [new_chain(LARGE, 8)]
        reservation = client.open_layout(LARGE).reserve(chains)
        targets = [reservation.slices(layer) for layer in range(LARGE.layers)]
        daemon.kill()
        daemon.start()
        others = [new_chain(LARGE, 8) for _ in range(12)]
        for chain in others:
            save(client, LARGE, chain)
        for layer in targets:
            for target in layer:
                target[:] = 0xEE
        for chain in others:
            verify(client, LARGE, chain[: client.open_layout(LARGE).contains(chain)])
        reservation.abandon()


def test_a_commit_that_a_stopped_daemon_does_not_answer_ends_in_time_and_the_blocks_can_be_saved_later(
    new_daemon: Callable[..., DaemonProcess],
) -> None:
    daemon, chains = new_daemon(), [new_chain(SMALL, 2)]
    with daemon.client() as client:
        blocks = client.open_layout(SMALL)
        first, second = blocks.reserve(chains), blocks.reserve([new_chain(SMALL, 1)])
        write(first, SMALL, chains)
        with daemon.stopped():
            with pytest.raises(DeadlineExceeded):
                first.commit(0.1)
            second.abandon()  # Does not wait.
        until(lambda: client.admin.status().uploads == 0)
        assert save(client, SMALL, chains[0]).is_complete
        verify(client, SMALL, chains[0])


_WRITER = """
import sys
from tests.integration.known_blocks import LARGE, new_chain
from kvservice_client import Client
client = Client(sys.argv[1], timeout_s=60)
reservation = client.open_layout(LARGE).reserve([new_chain(LARGE, 8, "doomed")])
print(len(reservation.slices(0)), flush=True)
sys.stdin.read()
"""


def test_the_death_of_a_writer_frees_its_space(new_daemon: Callable[..., DaemonProcess]) -> None:
    daemon = new_daemon()
    with daemon.client() as client:
        used = client.admin.status().dram.used_bytes
        process = subprocess.Popen(
            [sys.executable, "-c", _WRITER, daemon.address], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "8\n"
        assert client.admin.status().dram.used_bytes > used
        process.send_signal(signal.SIGKILL)
        process.communicate()
        until(lambda: client.admin.status().dram.used_bytes == used)
        assert save(client, LARGE, new_chain(LARGE, 8, "doomed")).stored == 8


def test_after_fork_a_reservation_is_the_parents(client: Client) -> None:
    chains = [new_chain(SMALL, 2)]
    reservation = client.open_layout(SMALL).reserve(chains)
    write(reservation, SMALL, chains)

    def use() -> None:
        with pytest.raises(ReservationEnded, match="before fork"), reservation:
            reservation.slices(0)
        reservation.abandon()
        gc.collect()

    in_child(use)
    assert reservation.commit()[0].stored == 2
    verify(client, SMALL, chains[0])


def test_threads_reserve_write_and_drop_at_once(client: Client) -> None:
    blocks, failures = client.open_layout(SMALL), []

    def work() -> None:
        try:
            for turn in range(10):
                chains = [new_chain(SMALL, 2), new_chain(SMALL, 1)]
                reservation = blocks.reserve(chains)
                if turn % 3:
                    write(reservation, SMALL, chains)
                    reservation.commit()
                    verify(client, SMALL, chains[0])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join(NEVER_S)
    assert not failures, failures
    until(lambda: client.admin.status().uploads == 0)
