"""A client that is stopped while it reads or writes in place, and continues later. Not a test: a program.

Arguments: the daemon's address, what to do (``view``, ``load`` or ``write``), the salt of a chain of ``LARGE``
blocks, its length, and the lease's time in seconds. It prints ``in the middle``, waits for a line, continues, and
prints the result: ``right``, ``WRONG`` or the name of the error.
"""

from __future__ import annotations

import sys

import grpc
import numpy as np

from kvservice_api.status import from_rpc_error
from kvservice_client import Client, KVError
from tests.integration.by_hand import InPlaceWriter
from tests.integration.known_blocks import LARGE, layers_of, new_chain
from tests.integration.wire import Wire


def view(address: str, salt: str, blocks: int, ttl_s: float) -> bool:
    """Reads arrays of the view, then checks whether they were valid."""
    chain = new_chain(LARGE, blocks, salt)
    with Client(address, transport="shm") as client:
        lease = client.open_layout(LARGE).lookup(chain, lease_ttl_s=ttl_s)
        seen = lease.view()
        slices = [seen.slices(layer) for layer in range(LARGE.layers)]
        pause()
        copies = [[each.copy() for (each,) in layer] for layer in slices]
        seen.check()
    return bool(np.array_equal(copies, layers_of(LARGE, chain)))


def load(address: str, salt: str, blocks: int, ttl_s: float) -> bool:
    """Loads one layer before the stop, and the others after it."""
    chain = new_chain(LARGE, blocks, salt)
    with Client(address, transport="shm") as client:
        layers = client.open_layout(LARGE).lookup(chain, lease_ttl_s=ttl_s).load()
        loaded = [next(layers).data]
        pause()
        loaded += [layer.data for layer in layers]
    return [layer.tobytes() for layer in loaded] == [
        np.concatenate(slices).tobytes() for slices in layers_of(LARGE, chain)
    ]


def write(address: str, salt: str, blocks: int, ttl_s: float) -> bool:
    """Writes half of the blocks before the stop; after it, writes other bytes over all of them and commits."""
    with Wire(address) as wire:
        wire.attach("stopped")
        wire.open_layout(LARGE)
        reserved = InPlaceWriter(wire, LARGE).reserve(new_chain(LARGE, blocks, salt))
        reserved.write(range(1))
        pause()
        reserved.scribble()
        reserved.write()
        return reserved.commit().stored == blocks


def pause() -> None:
    print("in the middle", flush=True)
    sys.stdin.readline()


def main() -> None:
    address, what, salt, blocks, ttl_s = sys.argv[1:]
    try:
        right = {"view": view, "load": load, "write": write}[what](address, salt, int(blocks), float(ttl_s))
        print("right" if right else "WRONG", flush=True)
    except KVError as error:
        print(type(error).__name__, flush=True)
    except grpc.RpcError as error:  # What a raw stub raises.
        print(type(from_rpc_error(error)).__name__, flush=True)


if __name__ == "__main__":
    main()
