"""A client with a lease, a running load and a running save. Not a test: a program that a test kills.

Arguments: the daemon's address, the salt of a stored chain of ``LARGE`` blocks, and its length.
"""

from __future__ import annotations

import sys
import threading

from kvservice_api.v1 import blocks_pb2
from tests.daemon import until
from tests.integration.known_blocks import LARGE, new_chain
from tests.integration.wire import Feed, Upload, Wire


def main(address: str, salt: str, blocks: int) -> None:
    wire = Wire(address)
    wire.attach("doomed")
    lease = wire.lookup(LARGE, new_chain(LARGE, blocks, salt), ttl_ms=300_000)
    load = wire.blocks.LoadBlocks(blocks_pb2.LoadBlocksRequest(client_id=wire.client_id, lease_id=lease.lease_id))
    next(load)
    messages = Upload.of(wire, LARGE, new_chain(LARGE, 8, f"of {salt}, never to be stored")).messages()
    saving = wire.begin_save(Feed(*messages[: len(messages) // 2]))
    until(lambda: wire.status().uploads == 8)
    print("in the middle", flush=True)
    threading.Event().wait()
    print(load, saving)  # Kept until here.


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
