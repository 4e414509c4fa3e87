"""Rotations of keys, from a configuration and from a model, and which rotations are refused."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    Cohere2Config,
    Cohere2ForCausalLM,
    DynamicCache,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from kvservice_adapter.device.arrays import bits_of, view_of
from kvservice_adapter.rope import ModelRopes, Rope, UnsupportedRotation
from kvservice_adapter.rope_of_model import rotaries_of
from tests.unit.rotary_models import (
    CONTEXT_TOKENS,
    MODELS,
    OPTIONS,
    SCALINGS,
    RecordedKeys,
    computed,
    rotary_model,
    states,
    tokens_of,
)

YARNS: dict[str, dict[str, Any]] = {
    "yarn, a given scale": {"attention_factor": 1.7},
    "yarn, two mscales": {"mscale": 0.707, "mscale_all_dim": 1.1},
    "yarn, other ramp": {"beta_fast": 20.0, "beta_slow": 2.0},
    "yarn, ramp not rounded": {"truncate": False},
    "yarn, factor from the lengths": {"factor": None},
}
PARAMETERS = {
    "default": {"rope_type": "default"},
    **{kind: {"rope_type": kind, **scaling} for kind, scaling in SCALINGS.items()},
    **{name: {"rope_type": "yarn", **SCALINGS["yarn"], **more} for name, more in YARNS.items()},
}


def rope_of(parameters: dict[str, Any], head_dim: int = 64, **options: Any) -> Rope:
    given = {"rope_theta": 5e5, **parameters}
    return Rope.from_config(given, head_dim=head_dim, max_position_embeddings=CONTEXT_TOKENS, **options)


def random_keys(tokens: int, dim: int = 64, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(2, tokens, dim, generator=torch.Generator().manual_seed(tokens)).to(dtype)


@pytest.mark.parametrize("part", [1.0, 0.5, 0.25])
@pytest.mark.parametrize("parameters", PARAMETERS.values(), ids=PARAMETERS)
def test_frequencies_and_scale_are_those_of_transformers_to_the_last_bit(
    parameters: dict[str, Any], part: float
) -> None:
    given = {"rope_theta": 5e5, "partial_rotary_factor": part, **parameters}
    config = LlamaConfig(**{**OPTIONS, "hidden_size": 384}, rope_parameters=dict(given))
    if given["rope_type"] == "default":
        dims = int(64 * part)
        theirs, scale = 1.0 / 5e5 ** (torch.arange(0, dims, 2).float() / dims), 1.0
    else:
        theirs, scale = ROPE_INIT_FUNCTIONS[given["rope_type"]](config)

    ours = rope_of(given)

    assert torch.equal(ours.frequencies, theirs)
    assert ours.attention_scaling == scale
    assert ours.dims == int(64 * part)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_and_its_configuration_give_the_same_rotation(name: str) -> None:
    model = rotary_model(name)
    of_model = Rope.from_model(model)

    of_config = Rope.from_config(
        model.config.rope_parameters,
        head_dim=16,
        pairing="interleaved" if "interleaved" in name else "half",
        max_position_embeddings=CONTEXT_TOKENS,
    )

    assert torch.equal(of_model.frequencies, of_config.frequencies)
    for field in ("pairing", "attention_scaling", "kind", "tokens_max", "dims"):
        assert getattr(of_model, field) == getattr(of_config, field), field


def test_older_configurations_say_type_for_rope_type() -> None:
    old = rope_of({"type": "linear", "factor": 2.0})

    assert torch.equal(old.frequencies, rope_of({"rope_type": "linear", "factor": 2.0}).frequencies)
    assert old.kind == "linear"


def test_gpt_j_pairs_neighbouring_dims() -> None:
    """It has no parameters of its own; an engine's connector provides them."""
    model: Any = GPTJForCausalLM(GPTJConfig(vocab_size=97, n_embd=64, n_head=2, n_layer=1, rotary_dim=16))
    model.eval()
    rope = rope_of({"rope_theta": 10000.0, "partial_rotary_factor": 0.5}, head_dim=32, pairing="interleaved")
    (here, _), (there, _) = (states(computed(model, tokens_of(9), first_position=first))[0] for first in (0, 100))

    rotation = rope.rotation(np.arange(9), np.arange(9) + 100)
    assert rotation is not None
    rotation.apply(here)

    assert torch.allclose(here, there, atol=1e-5)


def test_yarn_puts_its_scale_on_keys_once() -> None:
    """When keys are rotated for the first time, and never when they move to new positions."""
    rope = rope_of(PARAMETERS["yarn"])
    assert rope.attention_scaling == pytest.approx(0.1 * math.log(4) + 1)
    unrotated = random_keys(10)
    rotated = unrotated.clone()

    rope.placing(range(10), str(rotated.dtype).removeprefix("torch.")).apply(rotated)
    length_rotated = rotated.norm()
    rotation = rope.rotation(range(10), range(90, 100))
    assert rotation is not None
    rotation.apply(rotated)

    assert length_rotated == pytest.approx(float(unrotated.norm()) * rope.attention_scaling, rel=1e-5)
    assert rotated.norm() == pytest.approx(float(length_rotated), rel=1e-6)
    rope.unplacing(range(90, 100)).apply(rotated)
    assert torch.allclose(rotated, unrotated, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_keys_captured_before_rotation_are_rotated_as_the_model_does_bit_for_bit(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = rotary_model(name, dtype)
    rope = Rope.from_model(model)
    recorded = RecordedKeys(model, monkeypatch)
    cache = computed(model, tokens_of(30), first_position=7)

    for keys, (cached, _) in zip(recorded.unrotated, states(cache), strict=True):
        rope.placing(range(7, 37), str(keys.dtype).removeprefix("torch.")).apply(keys)
        assert torch.equal(keys[..., : rope.dims], cached[..., : rope.dims])


class TestDynamic:
    def test_keys_are_turned_while_the_prompt_is_shorter_than_the_context(self) -> None:
        rope = rope_of(PARAMETERS["dynamic"])

        assert rope.tokens_max == CONTEXT_TOKENS - 1
        rope.check_shift(CONTEXT_TOKENS - 1)
        with pytest.raises(UnsupportedRotation, match="change above 511 tokens; this prompt has 512"):
            rope.check_shift(CONTEXT_TOKENS)

    def test_up_to_that_length_the_model_uses_its_first_frequencies_also_after_longer_prompts(self) -> None:
        """A longer prompt changes them; the first shorter prompt restores them, one of the context's length does
        not.
        """
        model = rotary_model("llama, dynamic")
        rope = Rope.from_model(model)
        assert rope.tokens_max is not None
        rotary = model.model.rotary_emb

        computed(model, tokens_of(CONTEXT_TOKENS + 1))
        assert not torch.equal(rotary.inv_freq, rope.frequencies)
        computed(model, tokens_of(rope.tokens_max + 1))
        assert not torch.equal(rotary.inv_freq, rope.frequencies)
        computed(model, tokens_of(rope.tokens_max))
        assert torch.equal(rotary.inv_freq, rope.frequencies)

    def test_a_model_that_has_just_read_a_long_prompt_is_read_rightly(self) -> None:
        model = rotary_model("llama, dynamic")
        before = Rope.from_model(model)

        computed(model, tokens_of(CONTEXT_TOKENS + 100))

        assert torch.equal(Rope.from_model(model).frequencies, before.frequencies)
        computed(model, tokens_of(CONTEXT_TOKENS + 100))
        assert rotaries_of(model, 1) == rotaries_of(rotary_model("llama, dynamic"), 1)

    def test_without_the_context_length_it_is_refused(self) -> None:
        with pytest.raises(UnsupportedRotation, match="max_position_embeddings"):
            Rope.from_config({"rope_theta": 1e4, **PARAMETERS["dynamic"]}, head_dim=64)

    def test_other_kinds_have_no_such_limit(self) -> None:
        rope = rope_of(PARAMETERS["yarn"])

        assert rope.tokens_max is None
        rope.check_shift(10**9)


@pytest.mark.parametrize(
    ("parameters", "why"),
    [
        ({"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}, "length of the whole prompt"),
        ({"rope_type": "default", "mrope_section": [16, 8, 8]}, "several positions per token"),
        ({"full_attention": {"rope_type": "default"}, "sliding_attention": {}}, "from layer to layer"),
        ({"rope_type": "proportional"}, "'proportional' is not known"),
        ({"rope_type": "linear"}, "factor is None"),
        ({"rope_type": "llama3", "factor": 8.0}, "low_freq_factor is None"),
        ({"rope_type": "default", "rope_theta": None}, "rope_theta is None"),
        ({"rope_type": "default", "partial_rotary_factor": 0.05}, "3 of 64 dims"),
    ],
)
def test_a_rotation_that_is_not_known_is_refused_with_the_reason(parameters: dict[str, Any], why: str) -> None:
    with pytest.raises(UnsupportedRotation, match=why):
        rope_of(parameters)


def test_pairs_that_are_not_known_are_refused() -> None:
    with pytest.raises(UnsupportedRotation, match="'thirds'"):
        rope_of({}, pairing="thirds")


LOCAL_AND_GLOBAL = ["sliding_attention", "full_attention", "sliding_attention"]

# fmt: off
UNSUPPORTED: dict[str, tuple[Any, str]] = {
    "layers without rotary encoding": (
        lambda: SmolLM3ForCausalLM(SmolLM3Config(**{**OPTIONS, "num_hidden_layers": 4})), "keys of layer 3 are not"),
    "layers without it, interleaved": (
        lambda: Cohere2ForCausalLM(Cohere2Config(**{**OPTIONS, "num_hidden_layers": 4})), "keys of layer 3 are not"),
    "another base in other layers": (
        lambda: Gemma3ForCausalLM(Gemma3TextConfig(**OPTIONS, head_dim=16, layer_types=LOCAL_AND_GLOBAL)),
        "from layer to layer"),
    "learned positions": (
        lambda: GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=32, n_layer=1, n_head=2)), "no rotary frequencies"),
    "learned positions, another model": (
        lambda: OPTForCausalLM(OPTConfig(
            vocab_size=97, hidden_size=32, ffn_dim=32, num_hidden_layers=1, num_attention_heads=2,
            word_embed_proj_dim=32)), "no rotary frequencies"),
    "longrope": (
        lambda: LlamaForCausalLM(LlamaConfig(**OPTIONS, rope_parameters={
            "rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 128, "factor": 4.0,
            "short_factor": [1.0] * 8, "long_factor": [2.0] * 8})), "length of the whole prompt"),
}
# fmt: on


@pytest.mark.parametrize(("made", "why"), UNSUPPORTED.values(), ids=UNSUPPORTED)
def test_a_model_whose_keys_cannot_be_turned_is_refused_with_the_reason(made: Any, why: str) -> None:
    with pytest.raises(UnsupportedRotation, match=why):
        Rope.from_model(made().eval())


def test_layers_with_bases_of_their_own_are_each_turned_by_their_own() -> None:
    torch.manual_seed(0)
    config = Gemma3TextConfig(**OPTIONS, head_dim=16, layer_types=LOCAL_AND_GLOBAL)
    model: Any = Gemma3ForCausalLM(config)
    model.eval()
    here, there = (computed(model, tokens_of(9), first) for first in (0, 100))

    ropes = ModelRopes.from_model(model)
    rotations = ropes.rotations(np.arange(9), np.arange(9) + 100)

    assert ropes.layers[0] is ropes.layers[2] is not ropes.layers[1]
    assert rotations is not None
    for layer, ((keys, _), (expected, _)) in enumerate(zip(states(here), states(there), strict=True)):
        turned, by_another = keys.clone(), keys.clone()
        rotations[layer].apply(turned)
        rotations[(layer + 1) % 2].apply(by_another)
        assert (turned - expected).norm() <= 1e-4 * expected.norm()
        assert (by_another - expected).norm() > 0.1 * expected.norm()


def test_what_a_models_code_does_to_its_keys_after_rotation_is_noticed() -> None:
    """No configuration says so: a norm with weights does not commute with a rotation."""
    model = rotary_model("llama")
    weights = torch.linspace(0.5, 2.0, 16)

    class Normed(DynamicCache):
        def update(
            self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
        ) -> tuple[torch.Tensor, torch.Tensor]:
            keys = key_states * weights if layer_idx == 1 else key_states
            updated: tuple[torch.Tensor, torch.Tensor] = super().update(keys, value_states, layer_idx, *args, **kwargs)
            return updated

    forward = model.model.forward
    model.model.forward = lambda *args, **options: forward(*args, **{**options, "past_key_values": Normed()})

    with pytest.raises(
        UnsupportedRotation, match="keys of layer 1 are not rotated only by default rotary encoding of half"
    ):
        Rope.from_model(model)


def test_a_model_whose_frequencies_were_rounded_has_another_identity() -> None:
    """`model.to(bfloat16)` rounds them: its keys are others than those of a model that was loaded as bf16."""
    rounded, loaded = rotary_model("llama", torch.bfloat16), rotary_model("llama")

    assert rotaries_of(rounded, 1) != rotaries_of(loaded, 1)
    assert rotaries_of(loaded, 1)[0].parameters == ()
    assert rotaries_of(rounded, 1)[0].parameters[0][0] == "frequencies_crc32"
    assert rotaries_of(rounded, 1) == rotaries_of(rotary_model("llama", torch.bfloat16), 1)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=40))
def test_each_token_is_turned_by_its_own_difference_and_those_without_one_are_left(
    pairs: list[tuple[int, int]],
) -> None:
    rope = rope_of({})
    stored, read = (list(positions) for positions in zip(*pairs, strict=True))
    keys = random_keys(len(pairs))
    turned, expected = keys.clone(), keys.clone()
    rotation = rope.rotation(stored, read)

    rope.unplacing(stored).apply(expected)
    rope.placing(read, str(expected.dtype).removeprefix("torch.")).apply(expected)
    if rotation is None:
        assert stored == read
    else:
        rotation.apply(turned)

    assert torch.allclose(turned, expected, atol=1e-5)
    same = torch.tensor(stored) == torch.tensor(read)
    assert torch.equal(turned[:, same], keys[:, same])


@given(st.data())
def test_a_part_of_the_sequence_is_turned_as_it_is_in_the_whole(data: st.DataObject) -> None:
    """Pages hold runs of a sequence; each run is rotated in place."""
    stored = [0, 1, 2, 3, 20, 21, 22, 30, 40, 50, 51]
    cut = sorted(data.draw(st.lists(st.integers(0, len(stored)), min_size=2, max_size=2)))
    rotation = rope_of({}).rotation(stored, range(len(stored)))
    assert rotation is not None
    whole, part = random_keys(len(stored)), random_keys(len(stored))
    rotation.apply(whole)

    run = view_of(part[:, cut[0] : cut[1]])
    rotation.rotate_bits(bits_of(run), run.dtype, cut[0])

    assert torch.equal(part[:, cut[0] : cut[1]], whole[:, cut[0] : cut[1]])
    untouched = random_keys(len(stored))
    assert torch.equal(part[:, : cut[0]], untouched[:, : cut[0]])
    assert torch.equal(part[:, cut[1] :], untouched[:, cut[1] :])


def test_tokens_that_do_not_move_keep_their_bits() -> None:
    """An angle of 0 keeps the sign of a zero and NaNs, which arithmetic would change."""
    rotation = rope_of({}).rotation([0, 1, 2, 3], [0, 1, 1, 2])
    assert rotation is not None
    keys = random_keys(4)
    keys[:, 0], keys[:, 1, ::3] = -0.0, torch.inf
    before = keys.clone()

    rotation.apply(keys)

    assert torch.equal(keys[:, :2].view(torch.int32), before[:, :2].view(torch.int32))
    assert not torch.equal(keys[:, 2:], before[:, 2:])


def test_keys_of_any_strides_are_turned_in_place() -> None:
    rope = rope_of({}, pairing="interleaved")
    rotation = rope.rotation(range(6), range(5, 11))
    assert rotation is not None
    flat = random_keys(6)
    expected = flat.clone()
    rotation.apply(expected)

    spread = torch.zeros(6, 2, 3, 64)  # [token, head, something else, dim]
    keys = spread[:, :, 1].transpose(0, 1)
    keys.copy_(flat)
    rotation.apply(keys)

    assert torch.equal(keys, expected)
    assert not spread[:, :, 0].any()
    assert not spread[:, :, 2].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_halves_are_turned_in_fp32_and_rounded_once(dtype: torch.dtype) -> None:
    rope = rope_of({})
    rotation = rope.rotation(range(50), range(3000, 3050))
    assert rotation is not None
    keys = random_keys(50, dtype=dtype)
    exact = keys.float()

    rotation.apply(keys)
    rotation.apply(exact)

    assert torch.equal(keys, exact.to(dtype))


def test_a_long_shift_loses_no_digits() -> None:
    """A million positions, against fp64 throughout."""
    rope = rope_of({})
    keys = random_keys(1)
    rotation = rope.rotation([0], [1_000_003])
    assert rotation is not None
    turned = keys.clone()
    rotation.apply(turned)

    angles = 1_000_003 * rope.frequencies.double()
    first, second = keys[..., :32].double(), keys[..., 32:].double()
    expected = torch.cat(
        [first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], -1
    )
    assert torch.allclose(turned.double(), expected, atol=1e-6)


def test_keys_computed_in_inference_mode_can_be_turned_outside_it() -> None:
    with torch.inference_mode():
        keys = random_keys(3) * 1
    rotation = rope_of({}).rotation(range(3), range(1, 4))
    assert rotation is not None

    rotation.apply(keys)

    assert not torch.equal(keys, random_keys(3))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.uint8], ids=str)
def test_quantized_keys_are_refused(dtype: torch.dtype) -> None:
    rotation = rope_of({}).rotation(range(3), range(1, 4))
    assert rotation is not None

    with pytest.raises(UnsupportedRotation, match="recompute"):
        rotation.apply(torch.zeros(2, 3, 64, dtype=dtype))
