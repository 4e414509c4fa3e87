"""A decoder's forward pass over paged KV, with random weights: on torch, or as a stand-in of CuPy arrays.

Both keep the KV of one sequence in pages as vLLM does, ``[K and V][page][token][kv head][dim]`` per layer, numbered in
the sequence's order, and have two hooks per layer: before attention reads the history, and when the new KV is there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from kvservice_adapter.device.base import Device, Pages
from kvservice_api.cuda.runtime import why_unavailable

PAGE_TOKENS = 16
Hook = Callable[[int], object]  # Given the layer.


class Shape(NamedTuple):
    """A Llama-like decoder: RMSNorm, rotary positions, attention in groups of heads, SwiGLU."""

    name: str
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    ffn: int
    vocabulary: int

    def kv_bytes(self, tokens: int, item_bytes: int = 2) -> int:
        return 2 * self.layers * self.kv_heads * self.head_dim * item_bytes * tokens


LLAMA_13B = Shape("Llama-2-13B", 40, 40, 40, 128, 5120, 13824, 32000)
MISTRAL_7B = Shape(
    "Mistral-7B", 32, 32, 8, 128, 4096, 14336, 32000
)  # Its window is ignored: all tokens are attended to.
TINY = Shape("a tiny decoder", 3, 4, 2, 16, 64, 128, 256)


class Compute(Protocol):
    """One model, and the KV of one sequence. For one thread."""

    shape: Shape
    dtype: str  # Of the KV, in a layout's words.
    device: Device
    where: str  # For the report.

    def pages(self, layer: int) -> Pages:
        """Where the sequence is in a layer."""

    def forward(self, new: int, history: int, before: Hook | None = None, after: Hook | None = None) -> None:
        """Compute `new` tokens after `history` ones, whose KV is in the pages once `before` has returned."""

    def wait(self) -> None:
        """Block until all of it is computed: the last token's successor is known."""

    def keep(self, tokens: int) -> None:
        """Remember the KV of the sequence's first tokens."""

    def holds(self) -> bool:
        """Whether the pages have the remembered KV, to the bit."""

    def erase(self) -> None:
        """Overwrite all KV with zeros."""


def page_count(tokens: int) -> int:
    return -(-tokens // PAGE_TOKENS)


def make_compute(shape: Shape, tokens: int, *, rehearsal: bool) -> Compute:
    """A model on CUDA through torch. For a rehearsal without that, a stand-in on CuPy, or torch on the CPU.

    `tokens` is the longest sequence. Raises RuntimeError where torch has no CUDA, or no memory for the model.
    """
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # Of the model before.
        return TorchCompute(shape, tokens, torch.device("cuda", 0))
    if not rehearsal:
        raise RuntimeError("torch has no CUDA here")
    return TorchCompute(shape, tokens, torch.device("cpu")) if why_unavailable() else StandIn(shape, tokens)


@dataclass(frozen=True, slots=True)
class _Weights:
    norm: Any
    qkv: Any
    out: Any
    ffn_norm: Any
    gate_up: Any
    down: Any


class TorchCompute:
    def __init__(self, shape: Shape, tokens: int, place: Any) -> None:
        import torch

        from kvservice_adapter.torch_device import device_for

        self._torch = torch
        self.shape, self.dtype = shape, "bfloat16"
        self.device = device_for(place)
        self.where = f"torch {torch.__version__} on {place.type}"
        self._place = place
        generator = torch.Generator(place).manual_seed(0)

        def random(*size: int) -> Any:
            return torch.empty(size, dtype=torch.bfloat16, device=place).normal_(0, 0.02, generator=generator)

        def ones() -> Any:
            return torch.ones(shape.hidden, dtype=torch.bfloat16, device=place)

        q_rows, kv_rows = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        self._embedding = random(shape.vocabulary, shape.hidden)
        self._head = random(shape.vocabulary, shape.hidden)
        self._norm = ones()
        self._weights = [
            _Weights(
                ones(),
                random(q_rows + 2 * kv_rows, shape.hidden),
                random(shape.hidden, q_rows),
                ones(),
                random(2 * shape.ffn, shape.hidden),
                random(shape.hidden, shape.ffn),
            )
            for _ in range(shape.layers)
        ]
        size = (shape.layers, 2, page_count(tokens), PAGE_TOKENS, shape.kv_heads, shape.head_dim)
        self.kv = torch.zeros(size, dtype=torch.bfloat16, device=place)
        self._tokens = torch.randint(0, shape.vocabulary, (tokens,), device=place, generator=generator)
        angles = torch.arange(tokens, device=place)[:, None] / 10000.0 ** (
            torch.arange(0, shape.head_dim, 2, device=place) / shape.head_dim
        )
        self._cos, self._sin = angles.cos()[:, None], angles.sin()[:, None]  # [token, 1, dim / 2], fp32.
        self.next_token: Any = None
        self._kept: Any = None

    def pages(self, layer: int) -> Pages:
        keys, values = self.kv[layer].permute(0, 1, 3, 2, 4)  # [page, head, token, dim]
        return Pages(keys, values, range(len(keys)), dtype=self.dtype)

    def forward(self, new: int, history: int, before: Hook | None = None, after: Hook | None = None) -> None:
        with self._torch.inference_mode():
            self.next_token = self._forward(new, history, before, after)

    def _forward(self, new: int, history: int, before: Hook | None, after: Hook | None) -> Any:
        torch, shape, end = self._torch, self.shape, history + new
        linear, rms_norm = torch.nn.functional.linear, torch.nn.functional.rms_norm
        rows = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim, shape.kv_heads * shape.head_dim
        x = torch.nn.functional.embedding(self._tokens[history:end], self._embedding)
        for layer, weights in enumerate(self._weights):
            q, k, v = linear(rms_norm(x, (shape.hidden,), weights.norm), weights.qkv).split(rows, -1)
            q = self._rotated(q.view(new, shape.heads, shape.head_dim), history)
            k = self._rotated(k.view(new, shape.kv_heads, shape.head_dim), history)
            if before is not None:
                before(layer)
            keys, values = self.kv[layer].flatten(1, 2)  # [token, head, dim]
            keys[history:end] = k
            values[history:end] = v.view(new, shape.kv_heads, shape.head_dim)
            x = x + linear(self._attention(q, keys[:end], values[:end]).reshape(new, -1), weights.out)
            gate, up = linear(rms_norm(x, (shape.hidden,), weights.ffn_norm), weights.gate_up).chunk(2, -1)
            x = x + linear(torch.nn.functional.silu(gate) * up, weights.down)
            if after is not None:
                after(layer)
        return linear(rms_norm(x[-1:], (shape.hidden,), self._norm), self._head).argmax()

    def _rotated(self, states: Any, first: int) -> Any:
        cos, sin = (table[first : first + len(states)] for table in (self._cos, self._sin))
        a, b = states.float().chunk(2, -1)
        return self._torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(states.dtype)

    def _attention(self, q: Any, keys: Any, values: Any) -> Any:
        """Causal, with the last query at the last key. ``[token, head, dim]``."""
        from torch.nn.attention.bias import causal_lower_right

        q, keys, values = (each.transpose(0, 1)[None] for each in (q, keys, values))
        is_grouped = self.shape.heads != self.shape.kv_heads
        mask = causal_lower_right(q.shape[2], keys.shape[2])
        attend = self._torch.nn.functional.scaled_dot_product_attention
        return attend(q, keys, values, attn_mask=mask, enable_gqa=is_grouped)[0].transpose(0, 1)

    def wait(self) -> None:
        assert self.next_token is not None
        self.next_token.item()

    def keep(self, tokens: int) -> None:
        self._kept = self.kv[:, :, : page_count(tokens)].clone()

    def holds(self) -> bool:
        assert self._kept is not None
        here = self.kv[:, :, : self._kept.shape[2]]
        return bool(self._torch.equal(here.view(self._torch.int16), self._kept.view(self._torch.int16)))

    def erase(self) -> None:
        self.kv.zero_()


class StandIn:
    """The same calls and the same KV, with one elementwise kernel for a layer's computing: for rehearsals."""

    def __init__(self, shape: Shape, tokens: int) -> None:
        import cupy

        from kvservice_adapter.device.cuda import CudaDevice
        from kvservice_api.cuda.runtime import Gpu

        self._cupy = cupy
        self.shape, self.dtype = shape, "float16"
        self.device: Device = CudaDevice(Gpu(0), lambda: cupy.cuda.get_current_stream().ptr, slot_bytes=1 << 20)
        self.where = f"a stand-in on CuPy {cupy.__version__}"
        size = (shape.layers, 2, page_count(tokens), PAGE_TOKENS, shape.kv_heads, shape.head_dim)
        self.kv = cupy.zeros(size, np.float16)
        self._states = cupy.asarray(np.random.default_rng(0).random(size, np.float32).astype(np.float16))
        self._sum = cupy.zeros((PAGE_TOKENS * page_count(tokens), shape.kv_heads, shape.head_dim), np.float16)
        self._kept: Any = None

    def pages(self, layer: int) -> Pages:
        keys, values = self.kv[layer].transpose(0, 1, 3, 2, 4)
        return Pages(keys, values, range(len(keys)))

    def forward(self, new: int, history: int, before: Hook | None = None, after: Hook | None = None) -> None:
        end = history + new
        for layer in range(self.shape.layers):
            if before is not None:
                before(layer)
            for states, into in zip(self._states[layer], self.kv[layer], strict=True):
                _by_token(into)[history:end] = _by_token(states)[history:end]
                self._cupy.add(self._sum[:end], _by_token(into)[:end], out=self._sum[:end])
            if after is not None:
                after(layer)

    def wait(self) -> None:
        self._cupy.cuda.get_current_stream().synchronize()

    def keep(self, tokens: int) -> None:
        self._kept = self.kv[:, :, : page_count(tokens)].get()

    def holds(self) -> bool:
        assert self._kept is not None
        return np.array_equal(self.kv[:, :, : self._kept.shape[2]].get(), self._kept)

    def erase(self) -> None:
        self.kv.fill(0)
        self.wait()


def _by_token(pages: Any) -> Any:
    """``[token, head, dim]``, of the sequence."""
    return pages.reshape(-1, *pages.shape[2:])
