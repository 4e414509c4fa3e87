"""cuda_ipc: the daemon, another process, copies between its memory and this process's GPU memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from kvservice_api.errors import DeviceUnavailable, InvalidRequest, Overloaded, RegistrationEnded
from kvservice_api.v1 import devices_pb2 as pb
from kvservice_client import Client, Durability, Shard, Tier
from kvservice_client.device_memory import LoadPlace, SavePlace
from tests.daemon import SOON_S, DaemonProcess, until
from tests.gpu.ipc_engine import BITS, LAYERS, PAGES, Engine, layout_of, new_chain, same_tokens

pytestmark = pytest.mark.gpu

FROM, TO = [7, 2, 9, 4, 1], [3, 11, 0, 5, 8]


@pytest.mark.parametrize("dtype", BITS)
def test_blocks_are_saved_from_pages_and_loaded_into_others_to_the_bit(cupy: Any, client: Client, dtype: str) -> None:
    made = Engine(cupy, client, layout_of(dtype))
    assert made.memory.register(), client.stats().cuda_ipc_refused_because
    chain = new_chain(layout_of(dtype), 75)  # Two blocks, and a partial one that ends within a page.
    saved = made.fill()
    assert made.save(chain, FROM) == 3
    made.clear()

    assert made.load(chain, TO) == list(range(LAYERS))

    loaded = made.read()
    assert same_tokens(saved, FROM, loaded, TO, 0, 75)
    for layer in loaded:  # What is beside them in the last page, and other pages, stay.
        assert not layer[8, :, 75 - 64 :].any()
        assert not layer[[1, 2, 4, 6, 7, 9, 10]].any()


def test_only_the_named_tokens_are_written(engine: Engine) -> None:
    chain = new_chain(engine.layout, 64)
    saved = engine.fill()
    engine.save(chain, FROM)
    engine.clear()

    engine.load(chain, TO, 21, 50)

    loaded = engine.read()
    assert same_tokens(saved, FROM, loaded, TO, 21, 50)
    for layer in loaded:
        assert not layer[3].any()
        assert not layer[11, :, : 21 - 16].any()
        assert not layer[5, :, 50 - 48 :].any()


def test_what_is_stored_is_verified_bytes_for_every_other_transport(engine: Engine, client: Client) -> None:
    chain = new_chain(engine.layout, 32)
    pages = engine.fill()

    engine.save(chain, FROM)

    with engine.blocks.lookup(chain) as lease:
        loaded = [each.data.copy() for each in lease.load()]
    for layer, data in enumerate(loaded):
        ((keys, values),) = engine.blocks.layer_arrays(data, [32])
        run = np.concatenate([pages[layer][7], pages[layer][2]], axis=1)
        assert np.array_equal(np.concatenate([keys, values], axis=2).view(run.dtype), run)
    assert client.stats().transports["cuda_ipc"].saves == 1


def test_blocks_that_are_stored_already_are_not_read_again(engine: Engine) -> None:
    chain = new_chain(engine.layout, 64)
    first = engine.fill()
    engine.save(chain, FROM)
    engine.fill()

    assert engine.save(chain, FROM) == 0

    engine.load(chain, TO)
    assert same_tokens(first, FROM, engine.read(), TO, 0, 64)


def test_a_save_without_a_commit_stores_nothing(engine: Engine) -> None:
    chain = new_chain(engine.layout, 64)
    engine.fill()

    with engine.begin_save(chain, FROM) as save:
        save.gather()

    until(lambda: engine.blocks.contains(chain) == 0)
    assert engine.save(chain, FROM) == 2  # Its space and its claims are free.


def test_blocks_that_only_the_ssd_has_are_promoted_and_then_copied(engine: Engine, client: Client) -> None:
    chain, saved = new_chain(engine.layout, 64), engine.fill()
    with engine.begin_save(chain, FROM, durability=Durability.SSD) as save:
        save.gather()
        save.commit()
    assert client.evict(chain.keys, Tier.DRAM).evicted == 2
    engine.clear()

    engine.load(chain, TO)

    assert same_tokens(saved, FROM, engine.read(), TO, 0, 64)


def test_a_rank_loads_its_heads_of_blocks_that_were_stored_with_more(cupy: Any, client: Client, engine: Engine) -> None:
    chain, saved = new_chain(engine.layout, 75), engine.fill()
    engine.save(chain, FROM)
    rank = Engine(cupy, client, engine.layout, Shard(0, LAYERS, 1, 2))
    assert rank.memory.register()

    rank.load(chain, TO)

    assert same_tokens([layer[:, 1:] for layer in saved], FROM, rank.read(), TO, 0, 75)
    rank.memory.close()


def test_layers_of_another_group_have_their_tokens_in_other_pages(cupy: Any, client: Client) -> None:
    made = Engine(cupy, client, layout_of("float16"), groups=(0, 1, 0))
    assert made.memory.register()
    chain, saved = new_chain(made.layout, 64), made.fill()
    other_from, other_to = [0, 1, 2, 3], [9, 8, 7, 6]
    with made.memory.save([(chain, SavePlace(0, [FROM, other_from]))], Durability.DRAM, answer_s=SOON_S) as save:
        save.gather()
        save.commit()
    made.clear()

    with made.blocks.lookup(chain) as lease:
        list(made.copies(lease, LoadPlace(0, [TO, other_to], [0, 40], 64)))

    loaded = made.read()
    assert same_tokens(saved[::2], FROM, loaded[::2], TO, 0, 64)
    assert same_tokens(saved[1:2], other_from, loaded[1:2], other_to, 40, 64)
    assert not loaded[1][[9, 8]].any()
    made.memory.close()


def test_dram_is_registered_with_cuda_in_the_background_and_then_copied_by_dma(engine: Engine, client: Client) -> None:
    chain, saved = new_chain(engine.layout, 64), engine.fill()
    page_bytes, capacity_bytes = 4096, client.capabilities().arena_capacity_bytes

    until(lambda: client.admin.status().cuda.arena_registered_bytes >= capacity_bytes - page_bytes)

    engine.save(chain, FROM)
    engine.clear()
    engine.load(chain, TO)
    assert same_tokens(saved, FROM, engine.read(), TO, 0, 64)


def test_kvctl_explain_and_the_counters_know_the_path(engine: Engine, client: Client) -> None:
    chain = new_chain(engine.layout, 64)
    engine.fill()
    engine.save(chain, FROM)
    before = client.admin.status().counters["device_blocks"]

    with engine.blocks.lookup(chain, request_id="by cuda_ipc") as lease:
        list(engine.copies(lease, LoadPlace(0, [TO], [0], 64)))

    (lookup,) = client.admin.explain_request("by cuda_ipc").lookups
    assert [(load.path, load.outcome) for load in lookup.loads] == [("cuda_ipc", "done")]
    assert client.admin.status().counters["device_blocks"] == before + 2


# What a client sends is checked


def _forged(request: pb.RegisterMemoryRequest) -> None:
    request.allocations[0] = bytes(range(64))


def _too_short(request: pb.RegisterMemoryRequest) -> None:
    request.allocations[0] = request.allocations[0][:63]


def _too_many_pages(request: pb.RegisterMemoryRequest) -> None:
    request.layers[1].pages = 2**31 - 1


def _beyond_its_end(request: pb.RegisterMemoryRequest) -> None:
    request.layers[1].keys.offset_bytes += 2**21


def _strides_that_overflow(request: pb.RegisterMemoryRequest) -> None:
    request.layers[0].values.page_stride = 2**64 - 2
    request.layers[0].values.offset_bytes = 2**64 - 2


def _unaligned(request: pb.RegisterMemoryRequest) -> None:
    request.layers[0].keys.offset_bytes += 1


def _a_layer_too_few(request: pb.RegisterMemoryRequest) -> None:
    del request.layers[-1]


def _no_values(request: pb.RegisterMemoryRequest) -> None:
    request.layers[0].ClearField("values")


def _no_such_allocation(request: pb.RegisterMemoryRequest) -> None:
    request.layers[0].keys.allocation = 7


def _a_fence_elsewhere(request: pb.RegisterMemoryRequest) -> None:
    request.fence.count = 2**32 - 1


def _no_page(request: pb.RegisterMemoryRequest) -> None:
    request.layers[0].pages = 0


@pytest.mark.parametrize(
    "change",
    [
        _forged,
        _too_short,
        _too_many_pages,
        _beyond_its_end,
        _strides_that_overflow,
        _unaligned,
        _a_layer_too_few,
        _no_values,
        _no_such_allocation,
        _a_fence_elsewhere,
        _no_page,
    ],
)
def test_memory_that_is_not_as_the_client_says_is_refused(
    cupy: Any, client: Client, change: Callable[[pb.RegisterMemoryRequest], None]
) -> None:
    made = Engine(cupy, client, layout_of("bfloat16"))
    description = made.exported.description

    def changed() -> pb.RegisterMemoryRequest:
        request = description()
        change(request)
        return request

    made.exported.description = changed  # type: ignore[method-assign]

    assert not made.memory.register()
    assert isinstance(made.memory.refusal, InvalidRequest)


@pytest.mark.parametrize(
    ("page_ids", "first_token", "end"),
    [
        ([3, PAGES, 0, 5], 0, 64),
        ([3, 2**32 - 1, 0, 5], 0, 64),
        ([3, 11, 0], 0, 64),
        ([], 0, 64),
        (TO, 2**63, 2**63 + 64),
        (TO, 2**64 - 1, 2**64 - 1),
        (TO, 17, 2**64 - 1),
    ],
)
def test_page_tables_that_reach_outside_the_pages_write_nothing(
    engine: Engine, page_ids: list[int], first_token: int, end: int
) -> None:
    chain = new_chain(engine.layout, 64)
    engine.fill()
    engine.save(chain, FROM)
    engine.clear()

    with engine.blocks.lookup(chain) as lease, pytest.raises(InvalidRequest):
        list(engine.copies(lease, LoadPlace(first_token, [page_ids], [first_token], end)))

    assert not any(layer.any() for layer in engine.read())
    with pytest.raises(InvalidRequest), engine.begin_save(new_chain(engine.layout, 64), [5, PAGES, 1, 0]) as save:
        save.gather()


def test_another_clients_registration_is_not_found(engine: Engine, daemon: DaemonProcess, cupy: Any) -> None:
    chain = new_chain(engine.layout, 64)
    engine.fill()
    engine.save(chain, FROM)
    engine.clear()
    with daemon.client("other") as other:
        thief = Engine(cupy, other, engine.layout)
        assert thief.memory.register()
        thief.take_registration_of(engine)

        with pytest.raises(RegistrationEnded):
            thief.load(chain, TO)

    assert not any(layer.any() for layer in engine.read())


def test_a_client_may_have_few_registrations(cupy: Any, client: Client) -> None:
    engines = [Engine(cupy, client, layout_of("bfloat16")) for _ in range(5)]

    registered = [each.memory.register() for each in engines]

    assert registered == [True, True, True, True, False]
    assert isinstance(engines[-1].memory.refusal, Overloaded)
    engines[0].memory.close()
    assert Engine(cupy, client, layout_of("bfloat16")).memory.register()


def test_memory_is_closed_when_its_client_has_gone(cupy: Any, daemon: DaemonProcess) -> None:
    with daemon.client("observer") as observer:
        with daemon.client("gone") as gone:
            assert Engine(cupy, gone, layout_of("bfloat16")).memory.register()
            before = observer.admin.status().cuda.registrations
        until(lambda: observer.admin.status().cuda.registrations == before - 1)
    daemon.wait_for_log("GPU memory of a client is closed", client="gone")


def test_a_daemon_that_does_not_use_cuda_says_why(cupy: Any, new_daemon: Callable[..., DaemonProcess]) -> None:
    with new_daemon(cuda__enabled="off").client() as client:
        made = Engine(cupy, client, layout_of("bfloat16"))

        assert not made.memory.register()

        assert client.stats().cuda_ipc_refused_because == "cuda.enabled is off"
        assert "cuda_ipc" not in client.capabilities().transports
        with pytest.raises(DeviceUnavailable, match="off"):
            made.register_anyway()


def test_pages_that_cuda_does_not_export_name_the_setting_to_change(
    cupy: Any, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Engine(cupy, client, layout_of("bfloat16"))
    runtime = cupy.cuda.runtime

    def refuse(address: int) -> bytes:
        raise runtime.CUDARuntimeError(1)

    monkeypatch.setattr(runtime, "ipcGetMemHandle", refuse)

    assert not made.memory.register()
    assert "expandable_segments:False" in client.stats().cuda_ipc_refused_because
