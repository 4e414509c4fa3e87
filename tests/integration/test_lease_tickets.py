"""Lease tickets between processes: a scheduler looks up, ranks in other processes adopt and load."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvservice_api.errors import (
    BlockNotFound,
    InvalidRequest,
    LeaseExpired,
    TicketExpired,
    TicketForeign,
    TicketForged,
    TicketLayoutMismatch,
    TicketSpent,
)
from kvservice_client import BlockChain, Client, Shard
from tests.daemon import MIB, DaemonProcess, until
from tests.integration import test_layer_groups as groups
from tests.integration import ticket_processes
from tests.integration.known_blocks import LARGE, SMALL, compare, layers_of, new_chain, save

_BLOCKS = 16
_HEADS = range(LARGE.kv_heads)


class Process:
    """One of the programs of `ticket_processes`, spoken to line by line."""

    def __init__(self, *arguments: object) -> None:
        command = [sys.executable, "-m", ticket_processes.__name__, *map(str, arguments)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def read_line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def ask(self, line: str) -> str:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return self.read_line()

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def start() -> Iterator[Callable[..., Process]]:
    started: list[Process] = []

    def begin(*arguments: object) -> Process:
        started.append(Process(*arguments))
        return started[-1]

    yield begin
    for each in started:
        each.kill()


@pytest.fixture
def client(daemon: DaemonProcess) -> Iterator[Client]:
    with daemon.client(timeout_s=20) as client:
        yield client


def save_by_head(client: Client, chain: BlockChain) -> None:
    """As four ranks of a tensor-parallel model save: each its own head of all blocks."""
    layers = layers_of(LARGE, chain)
    for head in _HEADS:
        mine = [
            [np.ascontiguousarray(piece.reshape(2, LARGE.kv_heads, -1)[:, head]).reshape(-1) for piece in layer]
            for layer in layers
        ]
        rank = client.open_layout(LARGE, Shard(0, LARGE.layers, head, head + 1))
        assert rank.save(chain, mine).is_complete


@pytest.mark.parametrize(
    ("transport", "stored"),
    [
        ("grpc", "by head"),
        ("shm", "whole"),
        pytest.param("grpc", "whole", marks=pytest.mark.slow),
        pytest.param("shm", "by head", marks=pytest.mark.slow),
    ],
)
def test_four_ranks_adopt_what_the_scheduler_found_under_pressure_though_it_is_killed(
    new_daemon: Callable[..., DaemonProcess], start: Callable[..., Process], transport: str, stored: str
) -> None:
    daemon = new_daemon(dram__capacity_bytes=16 * MIB, ssd__capacity_bytes=0)
    with daemon.client(timeout_s=20) as client:
        until(lambda: client.admin.status().dram.capacity_bytes > 8 * MIB)
        chain = new_chain(LARGE, _BLOCKS, f"scheduled {transport} {stored}")
        salt = f"scheduled {transport} {stored}"
        if stored == "whole":
            assert save(client, LARGE, chain).is_complete
        else:
            save_by_head(client, chain)
        ranks = [start("rank", daemon.address, transport, head, salt, _BLOCKS) for head in _HEADS]
        assert [rank.read_line() for rank in ranks] == ["ready"] * 4

        def press() -> None:
            """Save more than DRAM holds, so that everything that is not held is evicted."""
            for _ in range(8):
                save(client, LARGE, new_chain(LARGE, _BLOCKS))

        scheduler = start("scheduler", daemon.address, salt, _BLOCKS, 4)
        hit, ticket = scheduler.read_line().split()
        assert hit == str(_BLOCKS)
        press()
        assert [rank.ask(f"adopt {ticket}") for rank in ranks[:2]] == [hit] * 2
        scheduler.kill()
        until(lambda: client.admin.status().clients == 5)
        press()
        assert [rank.ask(f"adopt {ticket}") for rank in ranks[2:]] == [hit] * 2
        press()
        assert ranks[0].ask(f"adopt {ticket}") == "TicketSpent"
        assert [rank.ask("load") for rank in ranks] == [f"right {transport}"] * 4
        if transport == "shm":
            assert [rank.ask("view") for rank in ranks] == ["right"] * 4
        assert [rank.ask("release") for rank in ranks] == ["released"] * 4
        press()
        assert client.open_layout(LARGE).contains(chain) < _BLOCKS, "what nothing holds is evicted under this pressure"
        assert client.admin.status().leases == 0


def test_what_is_no_valid_ticket_is_refused_with_its_own_error(
    client: Client, new_daemon: Callable[..., DaemonProcess]
) -> None:
    chain = new_chain(SMALL, 2)
    save(client, SMALL, chain)
    blocks = client.open_layout(SMALL)
    with blocks.lookup(chain) as lease:
        ticket = lease.export()
        for at in range(len(ticket)):
            forged = ticket[:at] + bytes([ticket[at] ^ 0x10]) + ticket[at + 1 :]
            with pytest.raises((TicketForged, TicketForeign)):
                blocks.adopt(forged)
            with pytest.raises(TicketForged):
                blocks.adopt(ticket[:at])
        with pytest.raises(TicketForged):
            blocks.adopt(ticket + b"\0")
        with pytest.raises(TicketLayoutMismatch):
            client.open_layout(LARGE).adopt(ticket)
        for shard in (Shard(0, 99, 0, 1), Shard(0, 0, 0, 1)):
            with pytest.raises(InvalidRequest):
                blocks.adopt(ticket, shard)
        for wrong in (None, "ticket", 5):
            with pytest.raises(InvalidRequest, match="bytes"):
                blocks.adopt(wrong)  # type: ignore[arg-type]
        other = new_daemon(ssd__capacity_bytes=0)
        with other.client(timeout_s=20) as stranger, pytest.raises(TicketForeign):
            stranger.open_layout(SMALL).adopt(ticket)

        with blocks.adopt(ticket) as adopted:  # After all of this it is still valid.
            compare(adopted, SMALL, chain)
        with pytest.raises(TicketSpent):
            blocks.adopt(ticket)

        short = lease.export(ttl_s=0.001)
        until(lambda: _error_of(lambda: blocks.adopt(short)) is TicketExpired)


def _error_of(call: Callable[[], Any]) -> type[Exception] | None:
    try:
        call().release()
    except Exception as error:
        return type(error)
    return None


def test_a_ticket_of_before_the_daemons_restart_is_refused_though_its_blocks_are_there(
    new_daemon: Callable[..., DaemonProcess],
) -> None:
    daemon = new_daemon(ssd__capacity_bytes=0)
    with daemon.client(timeout_s=20, reconnect_wait_s=10) as client:
        chain = new_chain(SMALL, 2)
        save(client, SMALL, chain)
        blocks = client.open_layout(SMALL)
        ticket = blocks.lookup(chain).export(adoptions=4)
        daemon.kill()
        daemon.start()
        with pytest.raises(TicketForeign):
            blocks.adopt(ticket)
        assert blocks.contains(chain) == 2


def test_a_ticket_outlives_the_release_of_its_lease_and_an_adopted_lease_its_ticket(client: Client) -> None:
    chain = new_chain(SMALL, 3)
    save(client, SMALL, chain)
    blocks = client.open_layout(SMALL)
    with blocks.lookup(chain) as lease:
        ticket = lease.export(adoptions=2)
    with pytest.raises(LeaseExpired):
        lease.export()
    first, second = blocks.adopt(ticket), blocks.adopt(ticket)
    assert first.token_counts == second.token_counts == chain.token_counts
    first.release()
    second.renew(60)
    compare(second, SMALL, chain)
    with blocks.adopt(second.export()) as again:  # An adopted lease can be exported again.
        second.release()
        compare(again, SMALL, chain)


@pytest.mark.parametrize(
    "arguments", [{"ttl_s": 0.0}, {"ttl_s": -1.0}, {"adoptions": 0}, {"adoptions": 4097}, {"ttl_s": float("nan")}]
)
def test_a_ticket_that_cannot_be_made_is_refused_at_once(client: Client, arguments: dict[str, Any]) -> None:
    chain = new_chain(SMALL, 1)
    save(client, SMALL, chain)
    with client.open_layout(SMALL).lookup(chain) as lease, pytest.raises(InvalidRequest):
        lease.export(**arguments)


def test_where_nothing_was_hit_there_is_nothing_to_export(client: Client) -> None:
    with client.open_layout(SMALL).lookup(new_chain(SMALL, 1)) as lease, pytest.raises(BlockNotFound):
        lease.export()


def test_the_example_of_the_page_on_tickets_runs(daemon: DaemonProcess, tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "tickets.md").read_text()
    (example,) = re.findall(r"```python\n((?s:.*?))```", page)
    program = tmp_path / "example.py"
    program.write_text(example.replace("127.0.0.1:7070", daemon.address))
    buffered = {
        **os.environ,
        "PYTHONUNBUFFERED": "",
    }  # Otherwise a line and its end are two writes, and ranks mix them.
    ran = subprocess.run(
        [sys.executable, program], env=buffered, capture_output=True, text=True, timeout=120, check=False
    )
    assert ran.returncode == 0, ran.stderr
    size_bytes = 512 * 2 * 64 * 2  # Tokens, K and V, dimensions of a head, bytes per element.
    expected = [
        f"rank {head}: 512 tokens, layer {layer}, {size_bytes} bytes" for head in range(4) for layer in range(2)
    ]
    assert sorted(ran.stdout.splitlines()) == expected


@pytest.mark.parametrize("transport", ["grpc", "shm"])
@pytest.mark.parametrize("name", groups.LAYOUTS)
@pytest.mark.parametrize("stored", ["whole", "by head", "by layers"])
def test_ranks_of_a_model_whose_layers_differ_adopt_their_parts(
    daemon: DaemonProcess, transport: str, name: str, stored: str
) -> None:
    layout = groups.LAYOUTS[name]
    whole, shards = Shard.whole(layout), groups.ranks(layout)
    parts = {"whole": [whole], "by head": shards[2:-2], "by layers": shards[-2:]}[stored]
    with daemon.client(timeout_s=20, transport=transport) as client:
        chain = groups.new_chain(layout)
        for part in parts:
            groups.save(client, layout, chain, part)
        blocks = client.open_layout(layout)
        with blocks.lookup(chain) as lease:
            ticket = lease.export(adoptions=1 + len(shards))
        for shard in [whole, *shards]:
            expected = [layer.tobytes() for layer in groups.expected(layout, chain, shard)]
            with blocks.adopt(ticket, shard) as adopted:
                assert adopted.token_counts == chain.token_counts
                assert [layer.data.tobytes() for layer in adopted.load()] == expected
                if transport == "shm" and any(part.covers(shard) for part in parts):
                    with adopted.view(verify="always") as view:  # In place, though several shards are stored.
                        seen = [view.slices(layer) for layer in range(shard.layers)]
                    assert [b"".join(piece.tobytes() for one in layer for piece in one) for layer in seen] == expected
