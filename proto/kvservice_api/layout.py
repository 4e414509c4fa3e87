"""A model's KV geometry, its fingerprint, and shards. Where bytes lie in a stored block: `image.py`."""

from __future__ import annotations

import functools
import hashlib
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field

from kvservice_api.errors import InvalidLayout, InvalidRequest, LayoutMismatch
from kvservice_api.v1 import types_pb2 as pb

DTYPE_BYTES: Mapping[str, int] = {
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "int8": 1,
    "uint8": 1,
}

_LAYOUT_TAG = b"kvservice/layout/1"
_PAIRINGS = ("half", "interleaved")

# Ceilings keep every product of dimensions far inside 64 bits, and a slice inside 32.
_LIMITS = {"layers": 4096, "kv_heads": 4096, "k_head_dim": 65536, "v_head_dim": 65536, "block_tokens": 65536}
_SLICE_BYTES_MAX = 2**30
_TEXT_BYTES_MAX = 1024


@dataclass(frozen=True, slots=True)
class Rotary:
    """How rotary position encoding was applied to keys. Identity only: nothing is computed here.

    `kind` is transformers' name of the scaling ("default", "linear", "yarn", ...) or "none".
    """

    kind: str = "none"
    pairing: str = "half"
    dims: int = 0
    base: float = 0.0
    parameters: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        # In one form only, as equal values must have equal fingerprints: adding 0.0 makes -0.0 a 0.0.
        object.__setattr__(self, "base", float(self.base) + 0.0)
        parameters = tuple(sorted((str(name), float(value) + 0.0) for name, value in self.parameters))
        object.__setattr__(self, "parameters", parameters)


@dataclass(frozen=True, slots=True)
class Layout:
    """Geometry and identity of one whole model's KV. No shard in it.

    Raises InvalidLayout where a dimension is zero or too large, or a name is unknown.
    `v_head_dim` may be 0: K and V are then one latent vector, stored as K.
    """

    model_id: str
    dtype: str
    layers: int
    kv_heads: int
    k_head_dim: int
    v_head_dim: int
    model_revision: str = ""
    block_tokens: int = 256
    rotary: Rotary = field(default_factory=Rotary)
    rotated: bool = True

    def __post_init__(self) -> None:
        for name, limit in _LIMITS.items():
            value = getattr(self, name)
            least = 0 if name == "v_head_dim" else 1
            if not isinstance(value, int) or not least <= value <= limit:
                raise InvalidLayout(f"{name} is {value!r}; it must be in {least}..{limit}", field=name)
        if self.dtype not in DTYPE_BYTES:
            raise InvalidLayout(f"dtype {self.dtype!r} is not one of {', '.join(DTYPE_BYTES)}", field="dtype")
        if not self.model_id:
            raise InvalidLayout("model_id is empty", field="model_id")
        for name, text in (("model_id", self.model_id), ("model_revision", self.model_revision)):
            if len(text.encode()) > _TEXT_BYTES_MAX:
                raise InvalidLayout(f"{name} is longer than {_TEXT_BYTES_MAX} bytes", field=name)
        self._check_rotary()
        whole = self.slice_bytes(self.kv_heads, self.block_tokens)
        if whole > _SLICE_BYTES_MAX:
            raise InvalidLayout(
                f"one layer of one block would take {whole} bytes; at most {_SLICE_BYTES_MAX} are allowed",
                field="block_tokens",
            )

    def _check_rotary(self) -> None:
        rotary = self.rotary
        if rotary.pairing not in _PAIRINGS:
            raise InvalidLayout(f"pairing {rotary.pairing!r} is not one of {', '.join(_PAIRINGS)}", field="rotary")
        if not 0 <= rotary.dims <= self.k_head_dim:
            raise InvalidLayout(f"rotary.dims is {rotary.dims}; it must be in 0..{self.k_head_dim}", field="rotary")
        if len({name for name, _ in rotary.parameters}) != len(rotary.parameters):
            raise InvalidLayout("a rotary parameter is named twice", field="rotary")
        numbers = (rotary.base, *(value for _, value in rotary.parameters))
        if not all(math.isfinite(number) for number in numbers):
            raise InvalidLayout("a rotary parameter is not a finite number", field="rotary")
        if len(rotary.kind.encode()) > _TEXT_BYTES_MAX or len(rotary.parameters) > 64:
            raise InvalidLayout("rotary has too long a kind or too many parameters", field="rotary")

    @property
    def dtype_bytes(self) -> int:
        return DTYPE_BYTES[self.dtype]

    @property
    def fingerprint(self) -> bytes:
        """SHA-256 over the canonical encoding, 32 bytes."""
        return _fingerprint(self)

    @property
    def bytes_per_token(self) -> int:
        """KV bytes of one token, over all layers and heads."""
        return self.layers * self.slice_bytes(self.kv_heads, 1)

    def slice_bytes(self, heads: int, tokens: int) -> int:
        """Bytes of one layer of a block with `tokens` tokens, for `heads` heads."""
        return heads * tokens * (self.k_head_dim + self.v_head_dim) * self.dtype_bytes

    def encode(self) -> bytes:
        """The canonical encoding: fields in order, u32 lengths before text, numbers big-endian."""
        rotary = self.rotary
        dims = (self.layers, self.kv_heads, self.k_head_dim, self.v_head_dim, self.block_tokens)
        parts = [
            _LAYOUT_TAG,
            *(_text(value) for value in (self.model_id, self.model_revision, self.dtype)),
            struct.pack(">5I?", *dims, self.rotated),
            _text(rotary.kind),
            _text(rotary.pairing),
            struct.pack(">IdI", rotary.dims, rotary.base, len(rotary.parameters)),
        ]
        for name, value in rotary.parameters:
            parts += [_text(name), struct.pack(">d", value)]
        return b"".join(parts)

    def to_proto(self) -> pb.Layout:
        rotary = self.rotary
        return pb.Layout(
            model_id=self.model_id,
            model_revision=self.model_revision,
            dtype=self.dtype,
            layers=self.layers,
            kv_heads=self.kv_heads,
            k_head_dim=self.k_head_dim,
            v_head_dim=self.v_head_dim,
            block_tokens=self.block_tokens,
            rotary=pb.Rotary(
                kind=rotary.kind,
                pairing=rotary.pairing,
                dims=rotary.dims,
                base=rotary.base,
                parameters=dict(rotary.parameters),
            ),
            rotated=self.rotated,
        )

    @classmethod
    def from_proto(cls, message: pb.Layout, fingerprint: bytes | None = None) -> Layout:
        """The layout in a message. Raises InvalidLayout, or LayoutMismatch for another fingerprint."""
        rotary = message.rotary
        layout = cls(
            model_id=message.model_id,
            model_revision=message.model_revision,
            dtype=message.dtype,
            layers=message.layers,
            kv_heads=message.kv_heads,
            k_head_dim=message.k_head_dim,
            v_head_dim=message.v_head_dim,
            block_tokens=message.block_tokens,
            rotary=Rotary(
                kind=rotary.kind,
                pairing=rotary.pairing,
                dims=rotary.dims,
                base=rotary.base,
                parameters=tuple(rotary.parameters.items()),
            ),
            rotated=message.rotated,
        )
        if fingerprint is not None and fingerprint != layout.fingerprint:
            raise LayoutMismatch(
                f"the layout's fingerprint is {layout.fingerprint.hex()}, not {fingerprint.hex() or 'empty'}",
                expected=layout.fingerprint.hex(),
            )
        return layout


@dataclass(frozen=True, slots=True, order=True)
class Shard:
    """The part of a block that one rank stores: half-open ranges of layers and KV heads."""

    layer_begin: int
    layer_end: int
    head_begin: int
    head_end: int

    _STRUCT = struct.Struct(">4H")

    @classmethod
    def whole(cls, layout: Layout) -> Shard:
        return cls(0, layout.layers, 0, layout.kv_heads)

    @property
    def layers(self) -> int:
        return self.layer_end - self.layer_begin

    @property
    def heads(self) -> int:
        return self.head_end - self.head_begin

    def covers(self, other: Shard) -> bool:
        return (
            self.layer_begin <= other.layer_begin
            and other.layer_end <= self.layer_end
            and self.head_begin <= other.head_begin
            and other.head_end <= self.head_end
        )

    def check(self, layout: Layout) -> Shard:
        """Itself. Raises InvalidRequest where it is empty or reaches outside the layout."""
        layers_fit = 0 <= self.layer_begin < self.layer_end <= layout.layers
        heads_fit = 0 <= self.head_begin < self.head_end <= layout.kv_heads
        if not (layers_fit and heads_fit):
            raise InvalidRequest(
                f"shard layers {self.layer_begin}..{self.layer_end}, heads {self.head_begin}..{self.head_end} "
                f"does not lie in {layout.layers} layers and {layout.kv_heads} heads",
                field="shard",
            )
        return self

    def encode(self) -> bytes:
        """8 bytes, big-endian; follows the block key in the index."""
        return self._STRUCT.pack(self.layer_begin, self.layer_end, self.head_begin, self.head_end)

    @classmethod
    def decode(cls, data: bytes) -> Shard:
        return cls(*cls._STRUCT.unpack(data))

    def to_proto(self) -> pb.Shard:
        return pb.Shard(
            layer_begin=self.layer_begin,
            layer_end=self.layer_end,
            head_begin=self.head_begin,
            head_end=self.head_end,
        )

    @classmethod
    def from_proto(cls, message: pb.Shard) -> Shard:
        return cls(message.layer_begin, message.layer_end, message.head_begin, message.head_end)


@functools.lru_cache(maxsize=1024)
def _fingerprint(layout: Layout) -> bytes:
    return hashlib.sha256(layout.encode()).digest()


def _text(value: str) -> bytes:
    data = value.encode()
    return struct.pack(">I", len(data)) + data
