"""Saves the KV blocks of a prompt, finds them again by the prompt's tokens, loads them and compares. NumPy only.

python -m examples.save_and_load                  # starts a daemon for itself
python -m examples.save_and_load 127.0.0.1:7070   # uses yours
"""

from __future__ import annotations

import numpy as np

from examples import local_daemon
from kvservice_client import Client, Layout, block_chain

# Two layers of 4 KV heads. A block is 64 consecutive tokens of a conversation.
LAYOUT = Layout("examples/blocks", "float32", layers=2, kv_heads=4, k_head_dim=16, v_head_dim=16, block_tokens=64)
BLOCKS = 3


def main() -> None:
    options = local_daemon.arguments(__doc__).parse_args()
    random = np.random.default_rng(seed=1)
    prompt = random.integers(0, 32000, BLOCKS * LAYOUT.block_tokens)
    # What an engine has computed for the prompt. Per layer: [block, K and V, head, token, dim].
    layers = [random.random((BLOCKS, 2, 4, 64, 16), dtype=np.float32) for _ in range(LAYOUT.layers)]

    with local_daemon.daemon(options.address) as address, Client(address, name="save_and_load") as client:
        blocks = client.open_layout(LAYOUT)
        chain = block_chain(LAYOUT, prompt)  # One key per block. It depends on all tokens up to the block's end.
        result = blocks.save(chain, layers)
        print(f"saved {result.stored} blocks")

        longer_prompt = np.append(prompt, random.integers(0, 32000, 100))
        with blocks.lookup(block_chain(LAYOUT, longer_prompt)) as lease:
            print(f"found {lease.hit_tokens} of {len(longer_prompt)} tokens; the engine computes the others")
            for layer in lease.load():  # Layer 0 first. The engine can begin with it while layer 1 is loaded.
                same = np.array_equal(layer.data.view(np.float32), layers[layer.index].reshape(-1))
                print(f"layer {layer.index}: {layer.data.nbytes} bytes, {'identical' if same else 'DIFFERENT'}")
        print(f"bytes loaded by transport: {dict(client.stats().loaded_bytes)}")


if __name__ == "__main__":
    main()
