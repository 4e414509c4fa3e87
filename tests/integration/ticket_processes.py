"""A scheduler that exports a lease, and a rank that adopts it. Not a test: programs, each a process of its own.

scheduler ADDRESS SALT BLOCKS ADOPTIONS    prints the hit blocks and the ticket, then waits to be killed
rank ADDRESS TRANSPORT HEAD SALT BLOCKS    attaches and prints "ready"; then obeys lines on standard input:
    adopt TICKET    prints the hit blocks, or the name of the error
    load            loads all bytes, prints "right" where they are those of the rank's head
    view            the same in place, verified
    release         ends the lease, prints "released"
"""

from __future__ import annotations

import sys
import threading
from typing import Literal, cast

import numpy as np

from kvservice_api.errors import KVError
from kvservice_client import Client, Lease, Shard
from tests.integration.known_blocks import LARGE, layers_of, new_chain

_TIMEOUT_S = 30.0


def say(*words: object) -> None:
    print(*words, flush=True)


def scheduler(address: str, salt: str, blocks: int, adoptions: int) -> None:
    client = Client(address, name="scheduler", timeout_s=_TIMEOUT_S, transport="grpc")
    lease = client.open_layout(LARGE).lookup(new_chain(LARGE, blocks, salt))
    say(lease.hit_blocks, lease.export(ttl_s=120, adoptions=adoptions).hex())
    threading.Event().wait()


def rank(address: str, transport: Literal["shm", "grpc"], head: int, salt: str, blocks: int) -> None:
    client = Client(address, name=f"rank {head}", timeout_s=_TIMEOUT_S, transport=transport)
    cache = client.open_layout(LARGE, Shard(0, LARGE.layers, head, head + 1))
    cache.ping()
    expected = _layers_of_head(salt, blocks, head)
    say("ready")
    lease: Lease | None = None
    for line in sys.stdin:
        verb, _, ticket = line.strip().partition(" ")
        if verb == "adopt":
            try:
                lease = cache.adopt(bytes.fromhex(ticket))
                say(lease.hit_blocks)
            except KVError as error:
                say(type(error).__name__)
            continue
        assert lease is not None
        if verb == "load":
            loaded = [layer.data.tobytes() for layer in lease.load()]
            say("right" if loaded == expected else "wrong", *client.stats().loaded_bytes)
        elif verb == "view":
            with lease.view(verify="always") as view:
                pieces = [view.slices(layer) for layer in range(LARGE.layers)]
                seen = [b"".join(part.tobytes() for parts in layer for part in parts) for layer in pieces]
            say("right" if seen == expected else "wrong")
        elif verb == "release":
            lease.release()
            say("released")


def _layers_of_head(salt: str, blocks: int, head: int) -> list[bytes]:
    """Per layer, the bytes for a rank with this head: per block its keys, then its values."""
    found = []
    for layer in layers_of(LARGE, new_chain(LARGE, blocks, salt)):
        halves = np.stack([piece.reshape(2, LARGE.kv_heads, -1) for piece in layer])
        found.append(np.ascontiguousarray(halves[:, :, head]).tobytes())
    return found


if __name__ == "__main__":
    role, *arguments = sys.argv[1:]
    if role == "scheduler":
        scheduler(arguments[0], arguments[1], int(arguments[2]), int(arguments[3]))
    else:
        address, transport, head, salt, blocks = arguments
        rank(address, cast(Literal["shm", "grpc"], transport), int(head), salt, int(blocks))
