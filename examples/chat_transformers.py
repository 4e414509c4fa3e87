"""A chat with a model of transformers. Each turn loads the history from the daemon and computes what is new.

The model is a tiny one with random weights, so its answers mean nothing; `--model` takes a real one.

    python -m examples.chat_transformers                                          # starts a daemon for itself
    python -m examples.chat_transformers 127.0.0.1:7070                           # uses yours
    python -m examples.chat_transformers --model HuggingFaceTB/SmolLM2-135M-Instruct
"""

from __future__ import annotations

import torch

from examples import local_daemon
from examples.models import load_model, tiny_model
from kvservice_adapter.connectors.transformers import TransformersConnector
from kvservice_client import Client

QUESTIONS = (
    "The island of Harrow has one railway, built in 1887 to carry slate to the harbour. What is it called? ",
    "And which engines does it have, and what became of the first one? ",
    "Who drove it? ",
)


def main() -> None:
    parser = local_daemon.arguments(__doc__)
    parser.add_argument("--model", default="", help="a folder, or a model of the hub (default: a tiny random one)")
    options = parser.parse_args()
    model, tokenizer, model_id, revision = load_model(options.model) if options.model else tiny_model()
    with (
        local_daemon.daemon(options.address) as address,
        Client(address, name="chat_transformers") as client,
        TransformersConnector(
            client,
            model,
            model_id=model_id,
            model_revision=revision,
            block_tokens=32,
            wait_s=5.0,  # An engine that serves people keeps the default of 0.25 s, and then computes.
        ) as connector,
    ):
        conversation: list[int] = []
        for number, question in enumerate(QUESTIONS, start=1):
            prompt = torch.tensor([conversation + tokenizer.encode(question)])
            history = connector.restore(prompt, session_id="chat")  # Its layers are loaded while the model computes.
            output = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                past_key_values=history.cache,
                max_new_tokens=24,
                do_sample=False,
            )
            conversation = output[0].tolist()
            # The last token of the answer was never fed to the model, so the cache does not hold it.
            connector.save(conversation[: history.cache.get_seq_length()], history.cache, session_id="chat", wait_s=10)
            loaded, total = history.loaded_tokens, prompt.shape[1]
            print(f"turn {number}: {loaded} of {total} tokens loaded, from {history.tier}")
            print(f"  {tokenizer.decode(conversation[total:])!r}")


if __name__ == "__main__":
    main()
