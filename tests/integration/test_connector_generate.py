"""Special handling of tokens in `generate`: it pads rows that have ended, and hides padding tokens."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from kvservice_adapter.connectors.transformers import TransformersConnector
from kvservice_client import Client
from tests.daemon import DaemonProcess
from tests.integration.row_ends import EndsRows
from tests.unit.connector_models import connector, tiny_llama

EOS, OTHER_EOS, PAD = 95, 94, 0
NEW_TOKENS = 20
config_of: Any = GenerationConfig
_names = map("row-{}".format, itertools.count())


class RowsEndWith(StoppingCriteria):
    """As stop strings do: a row has ended once its last token is this one."""

    def __init__(self, token: int) -> None:
        self._token = token

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **more: Any) -> torch.Tensor:
        return input_ids[:, -1] == self._token


@pytest.mark.parametrize(
    ("steps", "pads"),
    [
        ({0: 4}, (0, 0, 0)),
        ({0: 0, 1: 9, 2: 17}, (3, 0, 11)),
        ({0: 5, 1: 5, 2: 5}, (0, 2, 0)),
        ({}, (0, 0, 0)),
    ],
    ids=["one row", "all rows, one of them at once, padded on the left", "all rows together", "no row"],
)
@pytest.mark.parametrize(
    ("answer", "token"),
    [
        ({"eos_token_id": EOS, "pad_token_id": PAD}, EOS),
        ({"eos_token_id": EOS, "pad_token_id": EOS}, EOS),
        ({"eos_token_id": [EOS, OTHER_EOS], "pad_token_id": PAD}, OTHER_EOS),
        ({"eos_token_id": [EOS, OTHER_EOS]}, OTHER_EOS),
        ({"generation_config": config_of(eos_token_id=EOS, pad_token_id=PAD)}, EOS),
        (
            {
                "stopping_criteria": StoppingCriteriaList([RowsEndWith(EOS)]),
                "eos_token_id": OTHER_EOS,
                "pad_token_id": PAD,
            },
            EOS,
        ),
    ],
    ids=["eos", "pad is eos", "list of eos", "no pad", "generation config", "another criterion"],
)
def test_a_row_that_has_ended_is_kept_up_to_its_end_and_its_session_keeps_the_tail(
    daemon: DaemonProcess, steps: dict[int, int], pads: tuple[int, ...], answer: dict[str, Any], token: int
) -> None:
    model = tiny_llama()
    ids = torch.randint(1, 90, (3, 40), generator=torch.Generator().manual_seed(7))
    mask = (torch.arange(40) >= torch.tensor(pads)[:, None]).long()
    never = [PAD, *(each for each in (EOS, OTHER_EOS))]
    given = {"attention_mask": mask, "do_sample": False, "max_new_tokens": NEW_TOKENS, **answer}
    ending = LogitsProcessorList([EndsRows(40, steps, token, never)])
    names = [next(_names) for _ in pads]
    with Client(daemon.address) as client:
        subject = connector(client, model, salt=names[0].encode(), save_wait_s=10.0)
        history = subject.restore(ids, attention_mask=mask, session_id=names)
        output = model.generate(ids, past_key_values=history.cache, logits_processor=ending, **given)
        grown = torch.nn.functional.pad(mask, (0, output.shape[1] - 40), value=1)
        saved = subject.save(output, history.cache, attention_mask=grown, session_id=names)
        assert (saved.refused, saved.error) == (0, None)

        for row, name in enumerate(names):
            end = 40 + steps[row] + 1 if row in steps else output.shape[1]
            said = output[row, pads[row] : end]
            assert client.session(subject.layout, name).get().token_count == len(said) - 1
            follows = torch.cat([said, torch.tensor([5, 6, 7])])[None]
            next_turn = subject.restore(follows, session_id=name)
            assert next_turn.tokens == len(said) - 1
            with torch.inference_mode():
                logits = model(follows[:, next_turn.tokens :], past_key_values=next_turn.cache).logits[:, -1]
                assert torch.allclose(logits, model(follows).logits[:, -1], atol=1e-5)


def test_rows_whose_end_the_callers_mask_tells_are_kept_up_to_there(daemon: DaemonProcess) -> None:
    model, ids = tiny_llama(), torch.randint(1, 90, (2, 20), generator=torch.Generator().manual_seed(3))
    names = [next(_names) for _ in range(2)]
    with Client(daemon.address) as client:
        subject = connector(client, model, salt=b"told", save_wait_s=10.0)
        history = subject.restore(ids, attention_mask=torch.ones_like(ids), session_id=names)
        with torch.inference_mode():
            model(ids, past_key_values=history.cache)
        mask = torch.ones_like(ids)
        mask[0, 13:] = 0

        assert subject.save(ids, history.cache, attention_mask=mask, session_id=names).error is None
        counts = [client.session(subject.layout, name).get().token_count for name in names]
    assert counts == [13, 20]


def turns(subject: TransformersConnector, model: Any, answer: dict[str, Any], name: str, count: int = 3) -> list[int]:
    """A conversation with padding tokens. Returns the found tokens per turn; each turn answers as `generate` alone."""
    generator, found = torch.Generator().manual_seed(1), []
    prompt = torch.randint(1, 24, (1, 40), generator=generator)
    for _ in range(count):
        history = subject.restore(prompt, session_id=name)
        alone = model.generate(prompt, **answer)
        output = model.generate(prompt, past_key_values=history.cache, **answer)
        assert torch.equal(output, alone)
        saved = subject.save(output[0, : history.cache.get_seq_length()], history.cache, session_id=name)
        assert (saved.refused, saved.error) == (0, None)
        found.append(history.tokens)
        pads_said = torch.tensor([[0, 3, 0]])
        prompt = torch.cat([output, pads_said, torch.randint(1, 24, (1, 9), generator=generator)], 1)
    return found


@pytest.mark.parametrize(
    ("answer", "configured", "block_tokens"),
    [
        ({"pad_token_id": 0}, {}, 4),
        ({}, {"pad_token_id": 0}, 16),
        ({"generation_config": config_of(pad_token_id=0, max_new_tokens=40, do_sample=False)}, {}, 4),
        ({"pad_token_id": 0, "eos_token_id": [0, 23]}, {}, 16),
        ({"pad_token_id": 0, "eos_token_id": [22, 23]}, {}, 4),
        ({}, {"pad_token_id": 0, "eos_token_id": 0}, 16),
        ({"pad_token_id": None}, {"pad_token_id": 0}, 4),
        ({"pad_token_id": 3}, {"pad_token_id": 0}, 16),
        ({"pad_token_id": 0, "do_sample": True}, {}, 4),
    ],
    ids=[
        "given",
        "in the model's generation config",
        "in a generation config",
        "pad is one eos",
        "pad is no eos",
        "pad is eos in the config",
        "none given",
        "another one given",
        "sampled",
    ],
)
def test_a_conversation_in_which_the_pad_token_was_said_answers_as_without_us_and_is_saved_on(
    daemon: DaemonProcess, answer: dict[str, Any], configured: dict[str, Any], block_tokens: int
) -> None:
    model = tiny_llama(vocab_size=24, initializer_range=0.3)
    for field, value in configured.items():
        setattr(model.generation_config, field, value)
    name = next(_names)
    given = {"do_sample": False, "max_new_tokens": 40, **answer}
    with Client(daemon.address) as client:
        subject = connector(client, model, salt=name.encode(), block_tokens=block_tokens, save_wait_s=10.0)
        sampled = model.generate

        def generate(*tokens: Any, **more: Any) -> Any:
            torch.manual_seed(11)
            return sampled(*tokens, **more)

        model.generate = generate
        found = turns(subject, model, given, name)
    assert found[1] > 0, "the history is saved on"
    assert found[-1] > 0


def test_once_hidden_tokens_were_seen_histories_with_them_are_loaded_as_they_were_computed(
    daemon: DaemonProcess,
) -> None:
    model = tiny_llama(vocab_size=24, initializer_range=0.3)
    prompt = torch.randint(1, 24, (1, 61), generator=torch.Generator().manual_seed(5))
    prompt[0, [9, 33]] = 0
    answer: dict[str, Any] = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 0}
    with Client(daemon.address) as client:
        subject = connector(client, model, salt=b"seen", save_wait_s=10.0)
        outputs, errors, tokens = [], [], []
        for ask in (answer, answer, {**answer, "pad_token_id": None}, {**answer, "pad_token_id": None}):
            history = subject.restore(prompt)
            outputs.append(model.generate(prompt, past_key_values=history.cache, **ask))
            assert torch.equal(outputs[-1], model.generate(prompt, **ask))
            assert subject.save(outputs[-1], history.cache).error is None
            errors.append(history.error is not None)
            tokens.append(history.tokens)
        assert not torch.equal(outputs[0], outputs[-1]), "hidden tokens change the answer"
        assert tokens == [0, 60, 60, 60]
        assert errors == [False, False, True, False], "only what is masked in another way is computed again"


def test_a_mask_with_holes_that_restore_receives_is_reused(daemon: DaemonProcess) -> None:
    model, ids = tiny_llama(), torch.randint(1, 90, (2, 41), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    mask[0, :3] = mask[0, 9] = mask[1, 20] = 0
    answer: dict[str, Any] = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 6, "pad_token_id": 0}
    with Client(daemon.address) as client:
        subject = connector(client, model, salt=b"holes", save_wait_s=10.0)
        found = []
        for _ in range(2):
            history = subject.restore(ids, attention_mask=mask)
            output = model.generate(ids, past_key_values=history.cache, **answer)
            assert torch.equal(output, model.generate(ids, **answer))
            grown = torch.nn.functional.pad(mask, (0, output.shape[1] - 41), value=1)
            assert subject.save(output, history.cache, attention_mask=grown).error is None
            found.append((history.tokens, history.error))
        assert subject.restore(ids[1:]).tokens == 20, "without the mask only what is before the hole is the same"
    assert found == [(0, None), (39 + 36, None)]


def test_embeddings_in_place_of_tokens_answer_as_without_us(daemon: DaemonProcess) -> None:
    model = tiny_llama(vocab_size=24)
    ids = torch.randint(1, 24, (1, 40), generator=torch.Generator().manual_seed(5))
    ids[0, 7] = 0
    answer: dict[str, Any] = {"do_sample": False, "max_new_tokens": 8, "pad_token_id": 0}
    with Client(daemon.address) as client:
        subject = connector(client, model, salt=b"embeds", save_wait_s=10.0)
        for _ in range(3):
            for more in ({"inputs_embeds": model.get_input_embeddings()(ids)}, {"inputs": ids}):
                history = subject.restore(ids)
                output = model.generate(past_key_values=history.cache, **more, **answer)
                assert torch.equal(output, model.generate(**more, **answer))
