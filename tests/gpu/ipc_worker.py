"""An engine's worker in a process of its own: ``python -m tests.gpu.ipc_worker ADDRESS FIRST_TOKEN``.

It loads a chain of 64 tokens, prints "loading" once the first layer is there, and then waits to be killed.
"""

from __future__ import annotations

import sys
import threading

import cupy
import numpy as np

from kvservice_client import Client, block_chain
from kvservice_client.device_memory import LoadPlace
from tests.gpu.ipc_engine import Engine, layout_of


def main() -> None:
    with Client(sys.argv[1], name="worker") as client:
        engine = Engine(cupy, client, layout_of("bfloat16"))
        assert engine.memory.register()
        chain = block_chain(engine.layout, np.arange(64) + int(sys.argv[2]))
        lease = engine.blocks.lookup(chain)
        for _ in engine.copies(lease, LoadPlace(0, [[3, 11, 0, 5]], [0], 64)):
            print("loading", flush=True)
            threading.Event().wait()


if __name__ == "__main__":
    main()
