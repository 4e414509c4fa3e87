"""Families of transformers with the connector and a real daemon: token for token what `generate` answers alone.

The normal suite runs some ways of generation for most families; `slow` runs all ways for all families of the table.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import LogitsProcessorList

from kvservice_adapter.connectors.transformers import Restored, TransformersConnector, UnsupportedModel
from kvservice_adapter.connectors.transformers.cache import whole_cache
from kvservice_adapter.connectors.transformers.recompute import computed
from kvservice_client import Client
from tests.daemon import DaemonProcess
from tests.integration.families import FAMILIES, Family
from tests.integration.row_ends import EndsRows
from tests.unit.connector_models import connector

BLOCK_TOKENS = 8
PROMPT_TOKENS = 29  # Longer than the windows of these models.
EOS = 96
KEPT = [family for family in FAMILIES if not family.refused]
REFUSED = [family for family in FAMILIES if family.refused]
_names = map("engine-{}".format, itertools.count())

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def client(daemon: DaemonProcess) -> Iterator[Client]:
    with daemon.client() as made:
        yield made


def prompt_of(count: int, rows: int = 1) -> torch.Tensor:
    return torch.randint(3, 90, (rows, count), generator=torch.Generator().manual_seed(17))


class Engine:
    """A model, and a connector that has nothing stored of it yet."""

    def __init__(self, family: Family, client: Client, model: Any = None) -> None:
        self.family = family
        self.model = model or family.model()
        self.name = next(_names)  # For its salt, and for the ids of its sessions.
        self.connector: TransformersConnector = connector(
            client,
            self.model,
            model_id=family.name,
            salt=self.name.encode(),
            block_tokens=BLOCK_TOKENS,
            save_wait_s=10.0,
        )

    def turn(self, ids: torch.Tensor, session_id: str = "", **options: Any) -> Restored:
        """One prompt, answered with the connector and without. Saved afterwards."""
        ask = {"do_sample": False, "max_new_tokens": 7, "pad_token_id": 0, **options}
        history = self.connector.restore(ids, session_id=session_id)
        torch.manual_seed(5)
        output = self.model.generate(ids, past_key_values=history.cache, **ask)
        torch.manual_seed(5)
        assert torch.equal(output, self.model.generate(ids, **ask))
        saved = self.connector.save(output[0, : history.cache.get_seq_length()], history.cache, session_id=session_id)
        assert (saved.refused, saved.error, history.error) == (0, None, None)
        return history


def greedy(engine: Engine) -> None:
    ids = prompt_of(PROMPT_TOKENS)
    assert engine.turn(ids).tokens == 0
    assert engine.turn(ids).tokens == 24


def sampled(engine: Engine) -> None:
    ids = prompt_of(PROMPT_TOKENS)
    for found in (0, 24):
        assert engine.turn(ids, do_sample=True, temperature=1.3).tokens == found


def a_conversation(engine: Engine) -> None:
    """A prompt that equals the stored tokens, one that is one token longer, and one that is a block longer."""
    ids = prompt_of(PROMPT_TOKENS + 7 + BLOCK_TOKENS)
    assert engine.turn(ids[:, :PROMPT_TOKENS], engine.name, max_new_tokens=1).tokens == 0
    assert engine.turn(ids[:, :PROMPT_TOKENS], engine.name, max_new_tokens=1).tokens == PROMPT_TOKENS - 1
    assert engine.turn(ids[:, : PROMPT_TOKENS + 1], engine.name, max_new_tokens=1).tokens == PROMPT_TOKENS
    assert engine.turn(ids[:, : PROMPT_TOKENS + 1 + BLOCK_TOKENS], engine.name).tokens == PROMPT_TOKENS + 1


def a_prompt_of_whole_blocks(engine: Engine) -> None:
    """All of the prompt is stored; its last token is computed."""
    ids = prompt_of(4 * BLOCK_TOKENS)
    assert engine.turn(ids).tokens == 0
    assert engine.turn(ids).tokens == 3 * BLOCK_TOKENS


def a_padded_batch(engine: Engine) -> None:
    """Rows of two lengths that end at different times."""
    ids, pad = prompt_of(PROMPT_TOKENS, rows=2), 5
    mask = torch.ones_like(ids)
    mask[0, :pad] = 0
    ask = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 9, "pad_token_id": 0, "eos_token_id": EOS}
    ending = LogitsProcessorList([EndsRows(PROMPT_TOKENS, {0: 3}, EOS, [0, EOS])])
    alone = engine.model.generate(ids, logits_processor=ending, **ask)
    keeps, names = engine.family.keeps_padded_rows, [f"{engine.name}/{row}" for row in range(2)]
    for found in (0, 24 + 24 - pad if keeps else 0):
        history = engine.connector.restore(ids, attention_mask=mask, session_id=names)
        assert history.tokens >= found
        output = engine.model.generate(ids, past_key_values=history.cache, logits_processor=ending, **ask)
        assert torch.equal(output, alone)
        grown = torch.nn.functional.pad(mask, (0, output.shape[1] - PROMPT_TOKENS), value=1)
        saved = engine.connector.save(output, history.cache, attention_mask=grown, session_id=names)
        assert (saved.error is None) == keeps
    if keeps:
        ended = output[:1, pad : PROMPT_TOKENS + 4]
        follows = torch.cat([ended, torch.tensor([[5, 6]])], 1)
        assert engine.turn(follows, names[0]).tokens == ended.shape[1] - 1


def beams(engine: Engine) -> None:
    ids = prompt_of(PROMPT_TOKENS)
    ask = {"do_sample": False, "num_beams": 3, "max_new_tokens": 7, "pad_token_id": 0}
    engine.turn(ids)
    history = engine.connector.restore(ids)
    history.cache.batch_repeat_interleave(3)
    assert history.tokens == 24
    output = engine.model.generate(ids, past_key_values=history.cache, **ask)
    assert torch.equal(output, engine.model.generate(ids, **ask))


def computed_again(engine: Engine) -> None:
    """The history does not arrive: it is computed in the middle of the forward."""
    ids = prompt_of(PROMPT_TOKENS)
    engine.turn(ids)
    history = engine.connector.restore(ids)
    cache: Any = history.cache
    cache.history.close()
    ask = {"do_sample": False, "max_new_tokens": 7, "pad_token_id": 0}
    output = engine.model.generate(ids, past_key_values=history.cache, **ask)
    assert torch.equal(output, engine.model.generate(ids, **ask))


WAYS = [greedy, sampled, a_conversation, a_prompt_of_whole_blocks, a_padded_batch, beams, computed_again]
# The normal suite runs two ways for each fast family, which need the most of a cache; and two more where caches differ.
FAST_WAYS, MORE_WAYS = [a_conversation, a_padded_batch], [greedy, beams]
MOST_DIFFERENT = ["Llama", "GPT-2", "BLOOM", "Gemma 3, text", "DeepSeek-V3, latent attention", "gpt-oss"]


def test_enough_families_are_kept() -> None:
    assert len(KEPT) >= 25
    assert sum(family.is_fast for family in KEPT) >= 25


def test_the_page_has_the_same_families_and_says_the_same_of_each() -> None:
    page = (Path(__file__).parents[2] / "docs" / "transformers.md").read_text()
    rows = re.findall(r"^\| ([^|]+) \| (kept|refused)([^|]*) \|$", page, re.MULTILINE)
    listed = {name: (said, "padding on the left" in more) for names, said, more in rows for name in names.split("; ")}
    assert listed == {
        family.name: ("refused" if family.refused else "kept", not family.keeps_padded_rows) for family in FAMILIES
    }


@pytest.mark.parametrize("family", [each for each in KEPT if each.is_fast], ids=lambda family: family.name)
def test_a_family_answers_token_for_token_as_without_us(client: Client, family: Family) -> None:
    model = family.model()
    for way in [*FAST_WAYS, *(MORE_WAYS if family.name in MOST_DIFFERENT else [])]:
        way(Engine(family, client, model))


def test_the_most_different_families_are_fast_ones() -> None:
    assert {*MOST_DIFFERENT} <= {family.name for family in KEPT if family.is_fast}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("family", KEPT, ids=lambda family: family.name)
def test_every_family_answers_token_for_token_as_without_us(
    client: Client, family: Family, way: Callable[[Engine], None]
) -> None:
    way(Engine(family, client))


@pytest.mark.parametrize(
    "family",
    [*KEPT, *(each for each in REFUSED if each.refused == "position_ids")],
    ids=lambda family: family.name,
)
def test_the_kv_that_the_connector_computes_is_that_of_generate(family: Family) -> None:
    model, ids = family.model(), prompt_of(PROMPT_TOKENS)
    cache = whole_cache(model.config)
    ask = {"do_sample": False, "max_new_tokens": 1, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    model.generate(ids, past_key_values=cache, **ask)
    layers: list[Any] = cache.layers
    own = computed(model, ids.numpy(), np.ones(ids.shape, bool))
    assert len(own) == len(layers)
    for layer, (keys, values) in zip(layers, own, strict=True):
        torch.testing.assert_close(keys, layer.keys, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(values, layer.values, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", REFUSED, ids=lambda family: family.name)
def test_a_family_whose_blocks_could_not_be_restored_exactly_is_refused_with_the_reason(
    client: Client, family: Family
) -> None:
    with pytest.raises(UnsupportedModel, match=family.refused):
        Engine(family, client)


@pytest.mark.parametrize("seed", range(4))
def test_a_tiny_encoder_of_small_weights_in_bf16_is_refused(client: Client, seed: int) -> None:
    config = transformers.BertConfig(
        vocab_size=97, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    torch.manual_seed(seed)
    model: Any = transformers.BertLMHeadModel(config)
    with pytest.raises(UnsupportedModel, match="not causal"):
        connector(client, model.to(torch.bfloat16).eval(), model_id="encoder")
