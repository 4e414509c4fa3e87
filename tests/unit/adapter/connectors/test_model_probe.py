"""The connector accepts or refuses models by their computation, not by their names."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    BertLMHeadModel,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTBigCodeConfig,
    GPTBigCodeForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)

from kvservice_adapter.connectors.transformers import TransformersConnector, UnsupportedModel, layout_of
from kvservice_api.errors import InvalidLayout, InvalidRequest
from tests.unit.connector_models import KeptBlocks, computed, connector, prompt, states, tiny_llama

_TINY: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "bos_token_id": None,
    "eos_token_id": None,
}


def layout_for(model: Any) -> Any:
    return layout_of(model, model_id="tiny", model_revision="1", block_tokens=4)


def falcon(**options: Any) -> Any:
    model: Any = FalconForCausalLM(FalconConfig(**_TINY, **options))
    return model.eval()


def deepseek() -> Any:
    config = DeepseekV3Config(
        **_TINY,
        intermediate_size=64,
        num_key_value_heads=4,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        moe_intermediate_size=32,
    )
    model: Any = DeepseekV3ForCausalLM(config)
    return model.eval()


def big_code(**options: Any) -> Any:
    config = GPTBigCodeConfig(vocab_size=97, n_embd=48, n_layer=2, n_head=4, **options)
    model: Any = GPTBigCodeForCausalLM(config)
    return model.eval()


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (lambda: falcon(multi_query=True), (1, 12, 12)),
        (lambda: falcon(multi_query=False), (4, 12, 12)),
        (lambda: falcon(new_decoder_architecture=True, num_kv_heads=2), (4, 12, 12)),
        (lambda: big_code(multi_query=True), (1, 12, 12)),
        (lambda: big_code(multi_query=False), (4, 12, 12)),
        (deepseek, (1, 16, 8)),
        (lambda: tiny_llama(head_dim=20), (2, 20, 20)),
    ],
    ids=[
        "falcon mqa",
        "falcon mha",
        "falcon gqa, cached per query head",
        "bigcode mqa",
        "bigcode mha",
        "mla, latent",
        "head_dim",
    ],
)
def test_the_layout_has_the_heads_and_dims_that_the_cache_really_gets(model: Any, shape: tuple[int, ...]) -> None:
    subject = model()
    layout = layout_for(subject)

    assert (layout.kv_heads, layout.k_head_dim, layout.v_head_dim) == shape
    for keys, values in states(computed(subject, prompt(5))):
        assert (keys.shape[1], keys.shape[3], values.shape[3]) == shape


def bert(**options: Any) -> Any:
    return BertLMHeadModel(BertConfig(**_TINY, intermediate_size=32, **options))


@pytest.mark.parametrize("layers", [1, 2, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("training", [False, True])
def test_attention_that_is_not_causal_is_found_by_computing(layers: int, dtype: torch.dtype, training: bool) -> None:
    model: Any = BertLMHeadModel(BertConfig(**{**_TINY, "num_hidden_layers": layers}, intermediate_size=32))

    with pytest.raises(UnsupportedModel, match="not causal"):
        layout_for(model.to(dtype).train(training))


def test_the_same_encoder_is_taken_once_it_is_a_decoder() -> None:
    assert layout_for(bert(is_decoder=True)).kv_heads == 4


class _LooksAhead(torch.nn.Module):
    """Attention whose mask hides nothing, instead of a model's own."""

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, *given: Any, attention_mask: Any = None, **more: Any) -> Any:
        tokens = (more["hidden_states"] if "hidden_states" in more else given[0]).shape[1]
        return self.attention(*given, attention_mask=torch.zeros(1, 1, tokens, tokens), **more)


def test_one_layer_that_looks_ahead_is_found_though_the_configuration_is_that_of_a_decoder() -> None:
    model = tiny_llama()
    model.model.layers[0].self_attn = _LooksAhead(model.model.layers[0].self_attn)

    with pytest.raises(UnsupportedModel, match="not causal"):
        layout_for(model)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"is_causal": False}, "not causal"),
        ({"use_bidirectional_attention": True}, "not causal"),
        ({"add_cross_attention": True}, "encoder"),
    ],
    ids=["is_causal", "bidirectional", "cross attention"],
)
def test_what_the_configuration_says_is_enough_to_refuse(options: dict[str, Any], why: str) -> None:
    model = tiny_llama()
    for name, value in options.items():
        setattr(model.config, name, value)

    with pytest.raises(UnsupportedModel, match=why):
        layout_for(model)


def test_a_layer_of_another_shape_is_found_though_it_is_the_last() -> None:
    model, other = tiny_llama(num_hidden_layers=6), tiny_llama(num_hidden_layers=6, num_key_value_heads=3)
    model.model.layers[5] = other.model.layers[5]

    groups = layout_for(model).groups
    assert [(group.layers, group.kv_heads) for group in groups] == [(5, 2), (1, 3)]


def test_the_probe_computes_two_layers_and_changes_nothing() -> None:
    model = tiny_llama(num_hidden_layers=6)
    model.model.layers[2].train()
    ran: list[int] = []
    for index, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_hook(lambda *given, index=index: ran.append(index))
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    flags, random = [each.training for each in model.modules()], torch.get_rng_state()

    layout_for(model)

    assert ran == [0]
    assert [each.training for each in model.modules()] == flags
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())


class _Broken(torch.nn.Module):
    @property
    def config(self) -> Any:
        raise KeyError("config")


@pytest.mark.parametrize(
    "model",
    ["gpt2", None, 17, object(), torch.nn.Linear(2, 2), _Broken(), SimpleNamespace(config=GPT2Config())],
    ids=["str", "None", "int", "object", "module", "module that raises", "something with a config"],
)
def test_what_is_no_model_is_unsupported_and_nothing_else(model: Any) -> None:
    with pytest.raises(UnsupportedModel):
        TransformersConnector(KeptBlocks(), model, model_id="x", model_revision="1")  # type: ignore[arg-type]


def test_a_wrapped_model_is_refused_with_what_to_give_instead() -> None:
    wrapped = SimpleNamespace(peft_config={}, get_base_model=lambda: None, config=GPT2Config())

    with pytest.raises(UnsupportedModel, match="get_base_model"):
        connector(KeptBlocks(), wrapped, lora_id="mine")


def test_a_model_without_weights_or_without_attention_is_refused() -> None:
    with torch.device("meta"):
        without_weights = GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4))
    with pytest.raises(UnsupportedModel, match="meta"):
        layout_for(without_weights)
    with pytest.raises(UnsupportedModel):
        layout_for(MambaForCausalLM(MambaConfig(vocab_size=97, hidden_size=16, num_hidden_layers=2)))


def test_a_model_that_raises_is_unsupported_with_what_it_raised() -> None:
    model = tiny_llama()
    model.model.layers[0].self_attn.forward = None

    with pytest.raises(UnsupportedModel, match="could not be examined: TypeError"):
        layout_for(model)


def test_a_name_that_no_layout_can_have_is_not_the_models_fault() -> None:
    with pytest.raises(InvalidLayout):
        connector(KeptBlocks(), tiny_llama(), model_id="")


@pytest.mark.parametrize("client", ["127.0.0.1:7070", None, 7070])
def test_what_is_no_client_is_refused_at_once(client: Any) -> None:
    with pytest.raises(InvalidRequest, match="Client"):
        connector(client, tiny_llama())
