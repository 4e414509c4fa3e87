"""Lets a vLLM that was built for CUDA run its scheduler, connectors and attention layers on a CPU, without a model."""

from __future__ import annotations

import os
from typing import Any

import torch
import vllm.platforms
from vllm.platforms.cpu import CpuPlatform


def use_cpu() -> None:
    """Before any other module of vLLM is imported."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    vllm.platforms.current_platform = CpuPlatform()  # It would look for CUDA.


def define_kernel() -> None:
    """The cache update of vLLM's CPU backend, where the kernels of this vLLM lack it."""
    if hasattr(torch.ops._C, "cpu_attn_reshape_and_cache"):
        return
    kernels: Any = torch.library
    library = kernels.Library("_C", "FRAGMENT")
    library.define(
        "cpu_attn_reshape_and_cache(Tensor key, Tensor value, Tensor(a!) key_cache, Tensor(b!) value_cache, "
        "Tensor slot_mapping, str isa, float k_scale, float v_scale, str kv_cache_dtype) -> ()"
    )
    library.impl("cpu_attn_reshape_and_cache", _write_pages, "CPU")
    _LIBRARIES.append(library)  # Its operators go with it.


_LIBRARIES: list[Any] = []


def _write_pages(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    *_: object,
) -> None:
    """What the CPU kernel does: per page and head, keys ``[dim][token]``, and then values ``[token][dim]``."""
    tokens = key_cache.shape[2]
    page, place = slot_mapping // tokens, slot_mapping % tokens
    pages, heads, dim = key_cache.shape[0], key_cache.shape[1], key.shape[2]
    key_cache.as_strided((pages, heads, dim, tokens), (*key_cache.stride()[:2], tokens, 1))[page, :, :, place] = key
    first_value = value_cache.storage_offset()
    strides = (*value_cache.stride()[:2], dim, 1)
    value_cache.as_strided((pages, heads, tokens, dim), strides, first_value)[page, :, place, :] = value
