"""One lookup for several processes: a scheduler looks blocks up and exports its lease as a ticket, a worker loads.

Engines with several ranks work so: the scheduler decides how much of a prompt is loaded, and all ranks load that much.

    python -m examples.two_processes                  # starts a daemon for itself
    python -m examples.two_processes 127.0.0.1:7070   # uses yours
"""

from __future__ import annotations

import multiprocessing

import numpy as np

from examples import local_daemon
from kvservice_client import Client, Layout, Shard, block_chain

LAYOUT = Layout("examples/two-processes", "float16", layers=2, kv_heads=4, k_head_dim=64, v_head_dim=64)
TOKENS = 512


def worker(address: str, first_head: int, end_head: int, ticket: bytes) -> None:
    """Load some KV heads of what the scheduler has found."""
    with Client(address, name="worker") as client:
        blocks = client.open_layout(LAYOUT, Shard(0, LAYOUT.layers, first_head, end_head))
        with blocks.adopt(ticket) as lease:  # A lease of the worker's own. The worker does not look up.
            for layer in lease.load():
                print(
                    f"worker: layer {layer.index}, KV heads {first_head} and up, {lease.hit_tokens} tokens, "
                    f"{layer.data.nbytes} bytes",
                    flush=True,
                )


def scheduler(address: str) -> None:
    with Client(address, name="scheduler") as client:
        blocks, chain = client.open_layout(LAYOUT), block_chain(LAYOUT, np.arange(TOKENS))
        layer = np.random.default_rng(seed=1).bytes(TOKENS * LAYOUT.bytes_per_token // LAYOUT.layers)
        blocks.save(chain, [layer] * LAYOUT.layers)

        with blocks.lookup(chain) as lease:
            print(f"scheduler: {lease.hit_tokens} of {TOKENS} tokens are stored", flush=True)
            ticket = lease.export(ttl_s=30, adoptions=1) if lease.hit_blocks else b""
        if ticket:  # The scheduler's lease has ended. The ticket holds the blocks until the worker adopts it.
            process = multiprocessing.get_context("spawn").Process(target=worker, args=(address, 2, 4, ticket))
            process.start()
            process.join()
            if process.exitcode:
                raise SystemExit(f"the worker ended with exit code {process.exitcode}")


def main() -> None:
    options = local_daemon.arguments(__doc__).parse_args()
    with local_daemon.daemon(options.address) as address:
        scheduler(address)


if __name__ == "__main__":
    main()
