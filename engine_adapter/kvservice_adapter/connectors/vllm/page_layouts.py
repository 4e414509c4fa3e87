"""Where vLLM's pages have keys and values, proven at start.

A registered tensor's shape does not say where a token's key is: a CPU page has the shape ``[head, token, 2 * dim]`` and
holds transposed keys. Bytes that were read by a wrong view round-trip through equal pages unnoticed, and are wrong for
every other engine. So each backend that is known here has its views, and each layer's views are proven: numbered keys
and values go through the backend's own cache update, and are read back through the views.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

_BASE = 4  # Digits 0 to 3 are exact in every element type, also in float8.


class UnsupportedPages(ValueError):
    """The pages of this attention backend are not known, or not as they are known."""


class PageViews(NamedTuple):
    """Keys and values of one layer, each ``[page, kv head, token, dim]``, without a copy.

    Latent attention has one vector per token, which is kept as the key of one head; its values have no dims.
    """

    keys: torch.Tensor
    values: torch.Tensor


def _transposed_keys(pages: torch.Tensor, k_dim: int) -> PageViews:
    """CPU_ATTN: for each page and head, keys ``[dim][token]``, then values ``[token][dim]``."""
    count, heads, tokens, _ = pages.shape
    halves = pages.view(count, heads, 2, tokens * k_dim)
    keys = halves[:, :, 0].view(count, heads, k_dim, tokens).transpose(2, 3)
    return PageViews(keys, halves[:, :, 1].view(count, heads, tokens, k_dim))


def _side_by_side(pages: torch.Tensor, k_dim: int) -> PageViews:
    """Pages ``[head, token, key and value]``, of any strides; also latent vectors, beside values without dims."""
    return PageViews(pages[..., :k_dim], pages[..., k_dim:])


# vLLM's backends, by their names. A backend that is not here is refused.
VIEWS: Mapping[str, Callable[[torch.Tensor, int], PageViews]] = {
    "CPU_ATTN": _transposed_keys,
    "FLASH_ATTN": _side_by_side,
    "TRITON_ATTN": _side_by_side,
    "FLEX_ATTENTION": _side_by_side,
    "CPU_MLA": _side_by_side,
    "AMX_MLA": _side_by_side,
    "TRITON_MLA": _side_by_side,
    "FLASHMLA": _side_by_side,
    "FLASH_ATTN_MLA": _side_by_side,
    "FLASHINFER_MLA": _side_by_side,
    "CUTLASS_MLA": _side_by_side,
}

# Backends whose pages are known, and with which a hit does not give the tokens that a computation gives.
UNFIT: Mapping[str, str] = {"CPU_MLA": "vLLM 0.32 gives other tokens where a prompt follows cached KV, also its own"}


def check_backend(name: str, layer: Any) -> None:
    """Raises UnsupportedPages where a layer's backend cannot continue from loaded KV."""
    backend = layer.get_attn_backend().get_name()
    if backend in UNFIT:
        raise UnsupportedPages(f"{name} uses the attention backend {backend}: {UNFIT[backend]}")


def proven_views(name: str, layer: Any, pages: torch.Tensor, k_dim: int, v_dim: int) -> PageViews:
    """The views of a layer's registered pages. `layer` is vLLM's attention layer of that name.

    For the start, when no page is in use: it writes into two pages, and restores them. Raises UnsupportedPages.
    """
    backend = layer.get_attn_backend().get_name()
    if backend not in VIEWS:
        raise UnsupportedPages(
            f"{name} uses the attention backend {backend}, whose pages are not known; known are {', '.join(VIEWS)}"
        )
    if pages.ndim != 4 or pages.shape[0] < 3:
        raise UnsupportedPages(f"{name} has pages of shape {tuple(pages.shape)}, not [page, head, token, dims]")
    try:
        views = VIEWS[backend](pages, k_dim)
    except RuntimeError as error:  # torch's, for a view that the strides do not allow.
        raise UnsupportedPages(f"{name}: the pages of {backend} have no such views: {error}") from error
    shapes = tuple(views.keys.shape[3:]), tuple(views.values.shape[3:])
    if shapes != ((k_dim,), (v_dim,)):
        raise UnsupportedPages(f"{name}: keys and values have {shapes} dims, not {k_dim} and {v_dim}")
    _prove(name, backend, layer, pages, views)
    return views


def _prove(name: str, backend: str, layer: Any, pages: torch.Tensor, views: PageViews) -> None:
    if not hasattr(layer.impl, "do_kv_cache_update"):
        raise UnsupportedPages(f"{backend} has no cache update of its own, so its pages cannot be proven")
    page_tokens = views.keys.shape[2]
    used = pages[1:3]  # Page 0 is vLLM's null page.
    before = used.clone()
    slots = torch.arange(page_tokens, 3 * page_tokens, device=pages.device)
    heads, k_dim, v_dim = views.keys.shape[1], views.keys.shape[3], views.values.shape[3]
    tokens = 2 * page_tokens
    dtype = pages.dtype
    key_numbers = torch.arange(tokens * heads * k_dim, device=pages.device).view(tokens, heads, k_dim)
    value_numbers = torch.arange(tokens * heads * v_dim, device=pages.device).view(tokens, heads, v_dim)
    value_numbers = value_numbers + key_numbers.numel()
    highest, place = key_numbers.numel() + value_numbers.numel(), 1
    try:
        while place < highest:  # One digit of the numbers at a time: all elements are different in some digit.
            keys, values = ((each // place % _BASE).to(dtype) for each in (key_numbers, value_numbers))
            _update(layer, keys.contiguous(), values.contiguous(), pages, slots)
            for what, given, view in (("keys", keys, views.keys), ("values", values, views.values)):
                found = view[1:3].permute(0, 2, 1, 3).reshape(given.shape)
                if not torch.equal(found, given):
                    raise UnsupportedPages(f"{name}: {backend} keeps {what} elsewhere than this version knows")
            place *= _BASE
    finally:
        used.copy_(before)


def _update(layer: Any, keys: torch.Tensor, values: torch.Tensor, pages: torch.Tensor, slots: torch.Tensor) -> None:
    """Write tokens ``[token, head, dim]`` into pages, by the backend's own code."""
    update = layer.impl.do_kv_cache_update
    if values.shape[2]:
        update(layer, keys, values, pages, slots)
        return
    latent, rotated = keys[..., : layer.kv_lora_rank], keys[..., layer.kv_lora_rank :]
    parts = latent[:, 0].contiguous(), rotated.contiguous()
    update(*parts, pages.squeeze(1), slots, layer.kv_cache_dtype, layer._k_scale)
