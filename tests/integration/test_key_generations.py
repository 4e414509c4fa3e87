"""Key generations: durable numbers per layout, never forgotten and never used twice."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvservice.index.key_generations import KEY_GENERATIONS_NAME
from kvservice_adapter.engine.key_generation import KeyGeneration
from kvservice_api.errors import DaemonTooOld, StorageFailed
from kvservice_client import BlockCache, Client, Layout
from tests.daemon import SOON_S, DaemonProcess, until
from tests.integration.known_blocks import LARGE, SMALL, new_chain, save


@pytest.fixture
def own(tmp_path: Path) -> Iterator[DaemonProcess]:
    """A daemon of the test's own."""
    with DaemonProcess(tmp_path) as process:
        yield process


def generation(daemon: DaemonProcess, layout: Layout = SMALL) -> int:
    """As a new client sees it."""
    with daemon.client() as client:
        return client.open_layout(layout).generation()


def begin(daemon: DaemonProcess, layout: Layout = SMALL) -> int:
    with daemon.client() as client:
        return client.open_layout(layout).begin_generation()


def file_of(daemon: DaemonProcess) -> Path:
    return daemon.store / KEY_GENERATIONS_NAME


def lose_index(daemon: DaemonProcess) -> None:
    shutil.rmtree(daemon.store / "index")
    shutil.rmtree(daemon.arena_folder)


def test_a_layout_without_a_generation_is_in_generation_0_also_after_a_restart(own: DaemonProcess) -> None:
    assert generation(own) == 0
    own.stop()
    own.start()
    assert generation(own) == 0


def test_every_client_sees_a_new_generation_and_other_layouts_keep_theirs(daemon: DaemonProcess) -> None:
    with daemon.client() as one, daemon.client() as other:
        caches: list[BlockCache] = [client.open_layout(SMALL) for client in (one, other)]
        before = one.open_layout(LARGE).generation()
        first = caches[0].begin_generation()
        assert [cache.generation() for cache in caches] == [first, first]
        second = caches[1].begin_generation()
        assert [cache.generation() for cache in caches] == [second, second]
        assert len({0, first, second}) == 3
        assert one.open_layout(LARGE).generation() == before


def test_a_generation_survives_a_kill_right_after_the_answer(own: DaemonProcess) -> None:
    for _ in range(3):
        with own.client() as client:
            begun = client.open_layout(SMALL).begin_generation()
            own.kill()
        own.start()
        assert generation(own) == begun


def test_a_generation_survives_restarts_and_changes_of_the_tiers(own: DaemonProcess) -> None:
    begun = {layout.model_id: begin(own, layout) for layout in (SMALL, LARGE)}
    for change in ({"ssd.capacity_bytes": 0}, {"dram.capacity_bytes": 32 << 20}):
        own.stop()
        own.settings.update(change)
        own.start()
        assert {layout.model_id: generation(own, layout) for layout in (SMALL, LARGE)} == begun


def test_a_generation_that_cannot_be_written_is_not_begun(own: DaemonProcess) -> None:
    begun = begin(own)
    blocker = file_of(own).with_name(KEY_GENERATIONS_NAME + ".partial")
    blocker.mkdir()
    with own.client() as client:
        cache = client.open_layout(SMALL)
        with pytest.raises(StorageFailed, match="could not be written"):
            cache.begin_generation()
        assert cache.generation() == begun
        blocker.rmdir()
        assert cache.begin_generation() not in (0, begun)


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-1])])
def test_without_its_file_a_store_begins_generations_that_were_never_used(
    own: DaemonProcess, damage: Callable[[Path], object]
) -> None:
    used = {generation(own), generation(own, LARGE), begin(own)}
    own.stop()
    damage(file_of(own))
    own.start()
    new = generation(own)
    assert new not in used
    assert generation(own, LARGE) not in used, "LARGE may have had a generation too"
    own.wait_for_log("the store's key generations are lost")
    own.kill()
    own.start()
    assert generation(own) == new


def test_a_rebuilt_index_keeps_the_generations(own: DaemonProcess) -> None:
    begun = begin(own)
    with own.client() as client:
        save(client, SMALL, new_chain(SMALL))
    own.stop()
    lose_index(own)
    assert own.check("--rebuild").returncode == 1
    own.start()
    assert (generation(own), generation(own, LARGE)) == (begun, 0)


def test_a_store_that_has_lost_its_index_and_its_file_begins_generations_that_were_never_used(
    own: DaemonProcess,
) -> None:
    used = {generation(own), begin(own)}
    own.stop()
    lose_index(own)
    file_of(own).unlink()
    assert own.check("--rebuild").returncode == 1
    own.start()
    assert generation(own) not in used


def test_a_daemon_without_generations_is_named_as_too_old(tmp_path: Path) -> None:
    with DaemonProcess(tmp_path, program=("-m", "tests.older_daemon")) as older, older.client() as client:
        cache = client.open_layout(SMALL)
        for ask in (cache.generation, cache.begin_generation):
            with pytest.raises(DaemonTooOld, match="upgrade it"):
                ask()


# An engine's own


@pytest.fixture
def client(own: DaemonProcess) -> Iterator[Client]:
    with own.client(reconnect_wait_s=0.0) as client:
        yield client


@pytest.fixture
def engine(client: Client) -> Iterator[KeyGeneration]:
    engine = KeyGeneration(client.open_layout(SMALL), client.clock)
    yield engine
    engine.close()


def known(engine: KeyGeneration) -> int:
    until(lambda: engine.number is not None)
    assert engine.number is not None
    return engine.number


def test_an_engine_learns_its_generation_without_waiting_also_from_a_daemon_that_starts_later(
    own: DaemonProcess, client: Client
) -> None:
    begun = begin(own)
    own.stop()
    engine = KeyGeneration(client.open_layout(SMALL), client.clock)
    assert engine.number is None
    own.start()
    assert known(engine) == begun
    engine.close()


def test_an_engine_keeps_its_generation_until_its_own_reset(own: DaemonProcess, engine: KeyGeneration) -> None:
    assert known(engine) == 0
    others = begin(own)
    own.kill()
    own.start()
    assert known(engine) == 0, "its weights are still those of generation 0"
    assert engine.begin(SOON_S)
    assert known(engine) == generation(own) not in (0, others)


def test_after_a_reset_that_the_daemon_did_not_confirm_an_engine_has_no_generation_until_it_did(
    own: DaemonProcess, engine: KeyGeneration
) -> None:
    before = known(engine)
    own.kill()
    assert not engine.begin(0.05)
    assert engine.number is None
    own.start()
    assert known(engine) == generation(own) != before


def test_a_reset_while_the_generation_is_read_begins_a_new_one(own: DaemonProcess, client: Client) -> None:
    own.stop()
    engine = KeyGeneration(client.open_layout(SMALL), client.clock)
    assert not engine.begin(0.0)
    own.start()
    assert known(engine) == generation(own) != 0
    engine.close()


def test_an_engine_asks_again_after_an_error_that_no_daemon_gives(client: Client) -> None:
    """A thread that ended by it would leave the engine without a generation, and so without a store, for ever."""
    blocks = client.open_layout(SMALL)
    ask, calls = blocks.generation, []

    def asked(timeout_s: float | None = None) -> int:
        calls.append(timeout_s)
        if len(calls) == 1:
            raise RuntimeError("an error of another kind")
        return ask(timeout_s)

    blocks.generation = asked  # type: ignore[method-assign]  # The first call fails as no real one does.
    engine = KeyGeneration(blocks, client.clock)
    assert known(engine) == 0
    assert len(calls) == 2
    engine.close()
