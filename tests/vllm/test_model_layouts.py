"""Which models the connector takes, under which identity, and why it refuses the others. No engine runs."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVQuantMode,
    MambaSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
)

from kvservice_adapter.connectors.transformers import model_layout as transformers_layouts
from kvservice_adapter.connectors.vllm.model_layout import (
    ModelRefused,
    PageGroup,
    check_window,
    layout_of,
    shard_of,
)
from kvservice_adapter.connectors.vllm.settings import ConnectorSettings
from kvservice_client import Layout
from tests.vllm.ranks import PAGES, model_folder, settings_of, vllm_config

fast = pytest.mark.fast

SIZES: dict[str, Any] = {
    "vocab_size": 200,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 2048,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
MIXED = ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"]
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 512}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "llama 3.1": ("LlamaConfig", {"rope_parameters": LLAMA3}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {}),
    "qwen3 yarn": ("Qwen3Config", {"rope_parameters": YARN}),
    "qwen3 moe": ("Qwen3MoeConfig", {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 32}),
    "mistral": ("MistralConfig", {"sliding_window": None}),
    "mixtral": ("MixtralConfig", {"sliding_window": None, "num_local_experts": 2, "num_experts_per_tok": 1}),
    "gemma2": ("Gemma2Config", {"sliding_window": 128, "query_pre_attn_scalar": 32}),
    "gemma3": ("Gemma3TextConfig", {"sliding_window": 128, "query_pre_attn_scalar": 32, "layer_types": MIXED}),
    "gpt-oss": ("GptOssConfig", {"sliding_window": 128, "num_local_experts": 4, "layer_types": MIXED}),
    "phi3": ("Phi3Config", {}),
    "granite": ("GraniteConfig", {}),
    "olmo2": ("Olmo2Config", {}),
    "cohere": ("CohereConfig", {}),
}
FAST = ("llama", "gemma3")


def layers_of(config: Any, given: Any) -> KVCacheConfig:
    """One group, as vLLM makes it for a connector without several groups: windows are merged."""
    heads, dim = given.get_total_num_kv_heads(), given.get_head_size()
    spec = FullAttentionSpec(block_size=32, num_kv_heads=heads, head_size=dim, dtype=torch.float32)
    names = [f"model.layers.{layer}.self_attn.attn" for layer in range(config.num_hidden_layers)]
    return KVCacheConfig(PAGES, [], [KVCacheGroupSpec(names, spec)])


# vLLM inspects each architecture in a process of its own, which takes seconds.
@pytest.mark.parametrize("family", [pytest.param(each, marks=fast) if each in FAST else each for each in FAMILIES])
def test_a_model_has_the_layout_that_the_transformers_connector_gives_it(family: str, tmp_path: Path) -> None:
    name, more = FAMILIES[family]
    config = getattr(transformers, name)(**{**SIZES, **more})
    made: Any = transformers.AutoModelForCausalLM
    model = made.from_config(config).float()
    expected = transformers_layouts.layout_of(model, model_id="tiny", model_revision="1", block_tokens=48)
    config.architectures = [type(model).__name__]
    config.save_pretrained(tmp_path)
    vllm = vllm_config(tmp_path)
    found, _ = layout_of(vllm, layers_of(config, vllm.model_config), settings_of("127.0.0.1:1"))
    assert found == expected
    assert found.groups == expected.groups


# Refusals


@pytest.fixture(scope="module")
def vllm(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return vllm_config(model_folder(tmp_path_factory.mktemp("model")))


SPEC: dict[str, Any] = {"block_size": 32, "num_kv_heads": 4, "head_size": 32, "dtype": torch.float32}


def spec(**more: Any) -> Any:
    return FullAttentionSpec(**{**SPEC, **more})


def one_group(given: Any) -> KVCacheConfig:
    return KVCacheConfig(PAGES, [], [KVCacheGroupSpec([f"model.layers.{layer}.attn" for layer in range(3)], given)])


REFUSED: list[tuple[Any, str]] = [
    (MambaSpec(block_size=32, shapes=((4, 4),), dtypes=(torch.float32,)), "Mamba"),
    (ChunkedLocalAttentionSpec(**SPEC, attention_chunk_size=64), "ChunkedLocalAttentionSpec"),
    (spec(kv_quant_mode=KVQuantMode.FP8_PER_TENSOR), "quantized"),
    (spec(attention_chunk_size=64), "chunked attention"),
    (spec(non_causal=True), "not causal"),
    (spec(state_content_bytes=100), "packed"),
    (spec(num_kv_heads=3), "3 KV heads of 4"),
]


@pytest.mark.parametrize(("given", "why"), REFUSED, ids=[why for _, why in REFUSED])
@fast
def test_a_cache_that_is_not_each_tokens_kv_is_refused(vllm: Any, given: Any, why: str) -> None:
    with pytest.raises(ModelRefused, match=why):
        layout_of(vllm, one_group(given), settings_of("127.0.0.1:1"))


@fast
def test_several_groups_have_windows_and_page_sizes_of_their_own(vllm: Any) -> None:
    specs = [
        SlidingWindowSpec(**{**SPEC, "block_size": 64}, sliding_window=128),
        SlidingWindowSpec(**SPEC, sliding_window=256),
        spec(),
    ]
    groups = [KVCacheGroupSpec([f"model.layers.{2 - number}.attn"], each) for number, each in enumerate(specs)]
    layout, place = layout_of(vllm, KVCacheConfig(PAGES, [], groups), settings_of("127.0.0.1:1"))
    assert place.groups == [PageGroup(64, 128), PageGroup(32, 256), PageGroup(32, 0)]
    assert place.group_of_layer == [2, 1, 0]
    assert [type(each).__name__ for each in place.specs] == ["FullAttentionSpec", *["SlidingWindowSpec"] * 2]
    assert not place.is_plain
    assert layout == layout_of(vllm, one_group(spec()), settings_of("127.0.0.1:1"))[0]


@fast
def test_one_group_with_a_window_is_not_plain(vllm: Any) -> None:
    """vLLM frees its pages while a request runs."""
    windowed = SlidingWindowSpec(**SPEC, sliding_window=128)
    _, place = layout_of(vllm, one_group(windowed), settings_of("127.0.0.1:1"))
    assert (place.groups, place.is_plain) == ([PageGroup(32, 128)], False)
    _, place = layout_of(vllm, one_group(spec(sliding_window=128)), settings_of("127.0.0.1:1"))
    assert place.is_plain, "vLLM has merged the windows, and keeps all pages"


@fast
def test_a_group_that_cannot_be_stored_is_refused_also_beside_others(vllm: Any) -> None:
    mamba = MambaSpec(block_size=32, shapes=((4, 4),), dtypes=(torch.float32,))
    groups = [KVCacheGroupSpec([f"model.layers.{layer}.attn"], each) for layer, each in enumerate([spec(), mamba])]
    with pytest.raises(ModelRefused, match="attn keeps a state"):
        layout_of(vllm, KVCacheConfig(PAGES, [], groups), settings_of("127.0.0.1:1"))


@pytest.mark.parametrize(
    ("names", "why"),
    [
        (["model.layers.0.attn", "model.layers.1.attn"], "caches the layers"),
        (["model.layers.0.attn", "model.layers.0.indexer", "model.layers.1.attn"], "models of several parts"),
        (["model.0.layers.0.attn"], "no number of its own"),
    ],
)
@fast
def test_layers_that_are_not_the_models_are_refused(vllm: Any, names: list[str], why: str) -> None:
    with pytest.raises(ModelRefused, match=why):
        layout_of(vllm, KVCacheConfig(PAGES, [], [KVCacheGroupSpec(names, spec())]), settings_of("127.0.0.1:1"))


class _With:
    """A configuration with some values replaced, where vLLM itself would ask for more than one process to make it."""

    def __init__(self, given: Any, **replaced: Any) -> None:
        self._given = given
        self.__dict__.update(replaced)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._given, name)


@pytest.mark.parametrize(
    ("part", "replaced", "why"),
    [
        ("parallel_config", {"pipeline_parallel_size": 2}, "pipeline"),
        ("parallel_config", {"decode_context_parallel_size": 2}, "context"),
        ("model_config", {"is_encoder_decoder": True}, "encoder-decoder"),
        ("cache_config", {"calculate_kv_scales": True}, "calculate_kv_scales"),
    ],
)
@fast
def test_ways_to_run_a_model_are_refused(vllm: Any, part: str, replaced: dict[str, Any], why: str) -> None:
    given = _With(vllm, **{part: _With(getattr(vllm, part), **replaced)})
    with pytest.raises(ModelRefused, match=why):
        layout_of(given, one_group(spec()), settings_of("127.0.0.1:1"))


@pytest.mark.parametrize(
    ("part", "replaced", "why"),
    [
        ("model_config", {"hf_overrides": {"rms_norm_eps": 1.0}}, "hf_overrides"),
        ("load_config", {"load_format": "dummy"}, "dummy"),
    ],
)
@fast
def test_weights_that_the_models_files_do_not_say_need_a_revision(
    vllm: Any, part: str, replaced: dict[str, Any], why: str
) -> None:
    given = _With(vllm, **{part: _With(getattr(vllm, part), **replaced)})
    with pytest.raises(ModelRefused, match=why):
        layout_of(given, one_group(spec()), ConnectorSettings(address="127.0.0.1:1"))
    named, _ = layout_of(given, one_group(spec()), ConnectorSettings(address="127.0.0.1:1", model_revision="mine"))
    assert named.model_revision == "mine"


@pytest.mark.parametrize(
    ("used", "window", "is_refused"),
    [(128, 128, False), (None, 0, False), (128, 0, True), (None, 128, True), (64, 128, True), (None, 2048, False)],
)
@fast
def test_a_layer_that_vllm_computes_with_another_window_is_refused(
    used: int | None, window: int, is_refused: bool
) -> None:
    if is_refused:
        with pytest.raises(ModelRefused, match="by the configuration"):
            check_window("layer", used, window, 1024)
    else:
        check_window("layer", used, window, 1024)


# Ranks


@pytest.mark.parametrize(
    ("heads", "size", "expected"),
    [
        (4, 2, [(0, 2, True), (2, 4, True)]),
        (2, 4, [(0, 1, True), (0, 1, False), (1, 2, True), (1, 2, False)]),
        (1, 3, [(0, 1, True), (0, 1, False), (0, 1, False)]),
    ],
)
@fast
def test_each_head_has_one_rank_that_stores_it(heads: int, size: int, expected: list[tuple[int, int, bool]]) -> None:
    """A latent vector is one head: the first rank stores it."""
    layout = Layout("m", "float32", layers=2, kv_heads=heads, k_head_dim=8, v_head_dim=0 if heads == 1 else 8)
    ranks = [SimpleNamespace(rank=rank, tensor_parallel_size=size) for rank in range(size)]
    shards = [shard_of(layout, rank) for rank in ranks]
    assert [(shard.head_begin, shard.head_end, is_writer) for shard, is_writer in shards] == expected


@fast
def test_heads_that_ranks_cannot_share_evenly_are_refused() -> None:
    layout = Layout("m", "float32", layers=2, kv_heads=4, k_head_dim=8, v_head_dim=8)
    with pytest.raises(ModelRefused, match="cannot be divided"):
        shard_of(layout, SimpleNamespace(rank=0, tensor_parallel_size=6))


@fast
def test_a_latent_cache_has_one_vector_per_token_in_every_rank(tmp_path: Path) -> None:
    config = transformers.DeepseekV2Config(
        **{**{name: value for name, value in SIZES.items() if name != "head_dim"}, "num_key_value_heads": 4},
        kv_lora_rank=512,
        q_lora_rank=None,
        qk_rope_head_dim=64,
        qk_nope_head_dim=32,
        v_head_dim=32,
        n_routed_experts=2,
        first_k_dense_replace=9,
        architectures=["DeepseekV2ForCausalLM"],
    )
    config.save_pretrained(tmp_path)
    given = MLAAttentionSpec(block_size=16, num_kv_heads=1, head_size=576, dtype=torch.float32)
    names = [f"model.layers.{layer}.self_attn.attn" for layer in range(4)]
    caches = KVCacheConfig(PAGES, [], [KVCacheGroupSpec(names, given)])
    for size in (1, 2):
        vllm = vllm_config(tmp_path, parallel={"tensor_parallel_size": size, "rank": 0})
        layout, _ = layout_of(vllm, caches, settings_of("127.0.0.1:1"))
        (group,) = layout.groups
        assert (group.attention, group.geometry, group.rotary.dims) == ("latent", (1, 576, 0, "float32"), 64)
