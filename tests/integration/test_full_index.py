"""Small blocks fill the index of DRAM before its space: old blocks leave, and new ones are stored."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from kvservice_client import Durability, Layout
from tests.daemon import MIB, DaemonProcess
from tests.integration.known_blocks import SMALL, new_chain, save, verify

# Blocks of a page. An index of 1 MiB, as here, has space for some 3000 of them, and DRAM for 16,000.
_TINY = Layout("known/tiny", "float16", layers=1, kv_heads=1, k_head_dim=16, v_head_dim=16, block_tokens=16)


@pytest.mark.parametrize("ssd_bytes", [0, 64 * MIB], ids=["without ssd", "with ssd"])
def test_where_the_index_of_dram_is_full_old_blocks_leave_and_new_ones_come(
    new_daemon: Callable[..., DaemonProcess], ssd_bytes: int
) -> None:
    daemon = new_daemon(dram__capacity_bytes=64 * MIB, ssd__capacity_bytes=ssd_bytes, index__volatile_map_bytes=MIB)
    with daemon.client() as client:
        for _ in range(80):
            chain = new_chain(_TINY, 100)
            result = save(client, _TINY, chain)
            assert result.is_complete, result.refused[0]
        verify(client, _TINY, chain)
        status = client.admin.status()
        assert status.counters["evicted_dram_blocks"]
        assert status.dram.used_bytes < status.dram.capacity_bytes // 2


def test_many_blocks_of_one_save_replace_as_many_in_the_index_of_dram(
    new_daemon: Callable[..., DaemonProcess],
) -> None:
    daemon = new_daemon(dram__capacity_bytes=64 * MIB, ssd__capacity_bytes=0, index__volatile_map_bytes=MIB)
    with daemon.client() as client:
        for _ in range(3):
            chain = new_chain(_TINY, 2000)
            assert save(client, _TINY, chain).is_complete
            verify(client, _TINY, chain)


def test_blocks_that_fill_the_index_of_ssd_leave_space_for_sessions_and_layouts(
    new_daemon: Callable[..., DaemonProcess],
) -> None:
    daemon = new_daemon(ssd__capacity_bytes=128 * MIB, index__durable_map_bytes=4 * MIB)
    with daemon.client() as client:
        for _ in range(60):
            chain = new_chain(_TINY, 400)
            if save(client, _TINY, chain, Durability.SSD).refused:
                break
        else:
            pytest.fail("the index has space for 24,000 blocks")
        chain = chain[:100]

        for number in range(20):
            revision = client.session(_TINY, f"talk-{number}").append(chain, stored_position=0).revision
            assert revision == 1
        assert save(client, SMALL, new_chain(SMALL, 2)).is_complete, "its layout is new"
