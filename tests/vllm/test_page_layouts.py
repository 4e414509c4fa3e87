"""Where vLLM's pages have keys and values: where the backend's own cache update writes them, or they are refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm import _custom_ops as ops
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionBackendImpl
from vllm.v1.attention.backends.mla.cpu_mla import CPUMLABackend, CPUMLAImpl

from kvservice_adapter.connectors.vllm import page_layouts
from kvservice_adapter.connectors.vllm.page_layouts import UnsupportedPages, check_backend, proven_views

pytestmark = pytest.mark.fast

HEADS, DIM, PAGES = 3, 64, 5
needs_cpu_kernels = pytest.mark.skipif(
    not hasattr(torch.ops._C, "cpu_attn_reshape_and_cache"), reason="this vLLM has no kernels for a CPU"
)


class _Layer:
    """What the proof needs of vLLM's attention layer; the cache update is vLLM's own kernel."""

    def __init__(self, backend: Any = CPUAttentionBackend, isa: str = "vec") -> None:
        self.isa, self._k_scale_float, self._v_scale_float = isa, 1.0, 1.0
        self._backend = backend
        self.impl = CPUAttentionBackendImpl.__new__(CPUAttentionBackendImpl)
        self.impl.attn_type, self.impl.kv_cache_dtype = "decoder", "auto"

    def get_attn_backend(self) -> Any:
        return self._backend


def pages_of(page_tokens: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(PAGES, HEADS, page_tokens, 2 * DIM, dtype=dtype)


@needs_cpu_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("page_tokens", [32, 64, 128])
def test_the_views_show_what_the_backend_writes(page_tokens: int, dtype: torch.dtype) -> None:
    pages = pages_of(page_tokens, dtype)
    views = proven_views("layer", _Layer(), pages, DIM, DIM)
    keys, values = (torch.randn(1, HEADS, DIM).to(dtype) for _ in range(2))
    slot = 3 * page_tokens + 17
    ops.cpu_attn_reshape_and_cache(
        keys,
        values,
        *pages.view(PAGES, HEADS, 2 * page_tokens, DIM).chunk(2, dim=2),
        torch.tensor([slot]),
        "vec",
        k_scale=1.0,
        v_scale=1.0,
        kv_cache_dtype="auto",
    )
    assert torch.equal(views.keys[3, :, 17], keys[0])
    assert torch.equal(views.values[3, :, 17], values[0])


@needs_cpu_kernels
def test_the_proof_leaves_the_pages_as_they_were() -> None:
    pages = pages_of(32).normal_()
    before = pages.clone()
    proven_views("layer", _Layer(), pages, DIM, DIM)
    assert torch.equal(pages, before)


@needs_cpu_kernels
def test_views_that_only_fit_the_shape_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The registered shape suggests keys and values side by side; the bytes are not so."""
    monkeypatch.setattr(page_layouts, "VIEWS", {"CPU_ATTN": page_layouts._side_by_side})
    with pytest.raises(UnsupportedPages, match="elsewhere"):
        proven_views("layer", _Layer(), pages_of(32), DIM, DIM)


def test_an_unknown_backend_is_refused_by_name() -> None:
    backend = SimpleNamespace(get_name=lambda: "NEW_ATTN")
    with pytest.raises(UnsupportedPages, match="NEW_ATTN"):
        proven_views("layer", _Layer(backend), pages_of(32), DIM, DIM)


def test_a_backend_without_a_cache_update_of_its_own_is_refused() -> None:
    layer = _Layer()
    layer.impl = SimpleNamespace()
    with pytest.raises(UnsupportedPages, match="cannot be proven"):
        proven_views("layer", layer, pages_of(32), DIM, DIM)


class _LatentLayer:
    """As `_Layer`, with latent attention."""

    kv_lora_rank, qk_rope_head_dim, kv_cache_dtype, _k_scale = 512, 64, "auto", torch.ones(1)
    impl = CPUMLAImpl.__new__(CPUMLAImpl)

    def get_attn_backend(self) -> Any:
        return CPUMLABackend


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_latent_vector_is_kept_as_a_key_without_a_value(dtype: torch.dtype) -> None:
    pages, layer = torch.zeros(PAGES, 1, 16, 576, dtype=dtype), _LatentLayer()
    views = proven_views("layer", layer, pages, 576, 0)
    assert not pages.any()
    latent, rotated = torch.randn(1, 512).to(dtype), torch.randn(1, 1, 64).to(dtype)
    layer.impl.do_kv_cache_update(latent, rotated, pages.squeeze(1), torch.tensor([3 * 16 + 7]), "auto", layer._k_scale)
    assert torch.equal(views.keys[3, 0, 7], torch.cat([latent[0], rotated[0, 0]]))
    assert views.values.shape == (PAGES, 1, 16, 0)


def test_a_backend_that_computes_other_tokens_after_a_hit_is_refused() -> None:
    with pytest.raises(UnsupportedPages, match="other tokens"):
        check_backend("layer", _LatentLayer())
    check_backend("layer", _Layer())
