"""Many prompts with a common prefix, as one batch: after the first batch the prefix is loaded, not computed.

python -m examples.batch                  # starts a daemon for itself
python -m examples.batch 127.0.0.1:7070   # uses yours
"""

from __future__ import annotations

import torch

from examples import local_daemon
from examples.models import load_model, tiny_model
from kvservice_adapter.connectors.transformers import TransformersConnector
from kvservice_client import Client

PREFIX = "You are a patient librarian. Answer in a few plain sentences, and only from the book about the railway. " * 3
BATCHES = (
    ("Which engines does it have?  ", "Who was Agnes Mallory?       ", "Why is there a brass plate?  "),
    ("How did the line survive?    ", "What did Tern do in the fog? ", "Who chose the newest name?   "),
)


def main() -> None:
    parser = local_daemon.arguments(__doc__)
    parser.add_argument("--model", default="", help="a folder, or a model of the hub (default: a tiny random one)")
    options = parser.parse_args()
    model, tokenizer, model_id, revision = load_model(options.model) if options.model else tiny_model()
    with (
        local_daemon.daemon(options.address) as address,
        Client(address, name="batch") as client,
        TransformersConnector(
            client,
            model,
            model_id=model_id,
            model_revision=revision,
            block_tokens=32,
            wait_s=5.0,  # An engine that serves people keeps the default of 0.25 s, and then computes.
        ) as connector,
    ):
        for number, questions in enumerate(BATCHES, start=1):
            rows = [tokenizer.encode(PREFIX + question) for question in questions]
            length = max(map(len, rows))
            # Shorter rows are padded on the left. The mask says which tokens are real.
            prompts = torch.tensor([[0] * (length - len(row)) + row for row in rows])
            mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
            history = connector.restore(prompts, attention_mask=mask)
            output = model.generate(
                prompts, attention_mask=mask, past_key_values=history.cache, max_new_tokens=8, do_sample=False
            )
            known = history.cache.get_seq_length()
            ended = torch.ones(len(rows), known - length, dtype=mask.dtype)
            connector.save(output[:, :known], history.cache, attention_mask=torch.cat([mask, ended], dim=1), wait_s=10)
            print(f"batch {number}: {history.loaded_tokens} of {int(mask.sum())} tokens loaded")


if __name__ == "__main__":
    main()
