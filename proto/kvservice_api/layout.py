"""A model's KV geometry, its fingerprint, and shards. `image.py` has the places of bytes in a stored block."""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

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
_GROUPS_TAG = b"kvservice/layout/2"
_PAIRINGS = ("half", "interleaved")

# With these limits every product of dimensions fits into 64 bits, and the size of a slice into 32 bits.
_LAYERS_MAX = 4096
_BLOCK_TOKENS_MAX = 65536
_GROUP_LIMITS = {
    "layers": _LAYERS_MAX,
    "kv_heads": 4096,
    "k_head_dim": 65536,
    "v_head_dim": 65536,
    "window": 2**31 - 1,
}
_SLICE_BYTES_MAX = 2**30
_TEXT_BYTES_MAX = 1024


@dataclass(frozen=True, slots=True)
class Rotary:
    """How rotary position encoding was applied to keys. A part of the layout's identity; computes nothing.

    `kind` is the name of the scaling in transformers ("default", "linear", "yarn", ...) or "none".
    """

    kind: str = "none"
    pairing: str = "half"
    dims: int = 0
    base: float = 0.0
    parameters: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        # Equal values must have equal fingerprints: adding 0.0 turns -0.0 into 0.0.
        object.__setattr__(self, "base", float(self.base) + 0.0)
        parameters = tuple(sorted((str(name), float(value) + 0.0) for name, value in self.parameters))
        object.__setattr__(self, "parameters", parameters)


@dataclass(frozen=True, slots=True)
class LayerGroup:
    """Consecutive layers of a model whose KV has one geometry. `Layout` checks the values.

    `v_head_dim` is 0 if K and V are one latent vector, which is stored as K. `window` is the number of tokens that a
    sliding-window layer attends to; 0 means all tokens.
    """

    layers: int
    kv_heads: int
    k_head_dim: int
    v_head_dim: int
    dtype: str
    window: int = 0
    rotary: Rotary = field(default_factory=Rotary)

    @property
    def attention(self) -> str:
        """ "full", "sliding(WINDOW)" or "latent"."""
        if self.window:
            return f"sliding({self.window})"
        return "full" if self.v_head_dim else "latent"

    @property
    def dtype_bytes(self) -> int:
        return DTYPE_BYTES[self.dtype]

    @property
    def geometry(self) -> tuple[int, int, int, str]:
        """The values that determine a layer's bytes: (KV heads, head dim of K, head dim of V, dtype)."""
        return self.kv_heads, self.k_head_dim, self.v_head_dim, self.dtype

    def slice_bytes(self, heads: int, tokens: int) -> int:
        """Bytes of one layer of a block with `tokens` tokens, for `heads` heads."""
        return heads * tokens * (self.k_head_dim + self.v_head_dim) * self.dtype_bytes

    def check(self) -> None:
        """Raises InvalidLayout if a dimension is out of range or a name is unknown."""
        for name, limit in _GROUP_LIMITS.items():
            value, least = getattr(self, name), 0 if name in ("v_head_dim", "window") else 1
            _check_number(name, value, least, limit)
        if self.dtype not in DTYPE_BYTES:
            raise InvalidLayout(f"dtype {self.dtype!r} is not one of {', '.join(DTYPE_BYTES)}", field="dtype")
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


@dataclass(frozen=True, slots=True, eq=False, init=False)
class Layout:
    """Geometry and identity of one whole model's KV: an ordered list of layer groups. It contains no shard.

    Most models have the same geometry in all layers::

        Layout("llama", "bfloat16", layers=32, kv_heads=8, k_head_dim=128, v_head_dim=128)

    A model whose layers differ has groups, in the order of its layers. Equal neighbours become one group::

        Layout("gemma", groups=[LayerGroup(5, 8, 256, 256, "bfloat16", window=1024), LayerGroup(1, ...), ...])

    Raises InvalidLayout if a dimension is zero or too large, or a name is unknown.
    """

    model_id: str
    groups: tuple[LayerGroup, ...]
    model_revision: str
    block_tokens: int
    rotated: bool  # Whether stored keys carry the rotation of their positions.
    fingerprint: bytes = field(init=False, repr=False)  # SHA-256 over the canonical encoding, 32 bytes.
    _kv_heads: int = field(init=False, repr=False)
    _group_of_layer: tuple[LayerGroup, ...] = field(init=False, repr=False)

    def __init__(
        self,
        model_id: str,
        dtype: str | None = None,
        layers: int | None = None,
        kv_heads: int | None = None,
        k_head_dim: int | None = None,
        v_head_dim: int | None = None,
        model_revision: str = "",
        block_tokens: int = 256,
        rotary: Rotary | None = None,
        rotated: bool = True,
        *,
        groups: Sequence[LayerGroup] = (),
    ) -> None:
        geometry = {"dtype": dtype, "layers": layers, "kv_heads": kv_heads, "k_head_dim": k_head_dim,
                    "v_head_dim": v_head_dim, "rotary": rotary}  # fmt: skip
        given: dict[str, Any] = {name: value for name, value in geometry.items() if value is not None}
        if len(groups) > 1 and given:
            name = next(iter(given))
            raise InvalidLayout(f"{name} is given together with several groups, which have their own", field=name)
        if groups:
            groups = [replace(group, **given) for group in groups]  # So dataclasses.replace works for one geometry.
        else:
            missing = [name for name in geometry if name not in given and name != "rotary"]
            if missing:
                raise InvalidLayout(f"{missing[0]} is missing", field=missing[0])
            groups = [LayerGroup(**given)]
        for group in groups:
            group.check()
        joined = _joined(groups)
        self._set(model_id=model_id, model_revision=model_revision, block_tokens=block_tokens, rotated=bool(rotated))
        self._set(groups=joined, _kv_heads=max(group.kv_heads for group in joined))
        self._set(_group_of_layer=tuple(group for group in joined for _ in range(group.layers)))
        self._check()
        self._set(fingerprint=hashlib.sha256(self.encode()).digest())

    def _set(self, **fields: object) -> None:
        for name, value in fields.items():
            object.__setattr__(self, name, value)

    def _check(self) -> None:
        _check_number("layers", self.layers, 1, _LAYERS_MAX)
        _check_number("block_tokens", self.block_tokens, 1, _BLOCK_TOKENS_MAX)
        texts: tuple[tuple[str, object], ...] = (
            ("model_id", self.model_id),
            ("model_revision", self.model_revision),
        )
        for name, text in texts:
            if not isinstance(text, str):
                raise InvalidLayout(f"{name} is of type {type(text).__name__}; it must be text", field=name)
            if len(text.encode()) > _TEXT_BYTES_MAX:
                raise InvalidLayout(f"{name} is longer than {_TEXT_BYTES_MAX} bytes", field=name)
        if not self.model_id:
            raise InvalidLayout("model_id is empty", field="model_id")
        whole = max(group.slice_bytes(group.kv_heads, self.block_tokens) for group in self.groups)
        if whole > _SLICE_BYTES_MAX:
            raise InvalidLayout(
                f"one layer of one block would take {whole} bytes; at most {_SLICE_BYTES_MAX} are allowed",
                field="block_tokens",
            )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Layout) and self.fingerprint == other.fingerprint

    def __hash__(self) -> int:
        return int.from_bytes(self.fingerprint[:8])  # The same in every process: layouts are pickled.

    @property
    def layers(self) -> int:
        """Layers of all groups together."""
        return len(self._group_of_layer)

    @property
    def kv_heads(self) -> int:
        """The highest number of KV heads of a layer: the unit of a shard's head range (`heads_of`)."""
        return self._kv_heads

    @property
    def dtype(self) -> str:
        """The dtype of all groups. Raises InvalidLayout if the groups differ, as do the next three properties."""
        return str(self._common("dtype"))

    @property
    def k_head_dim(self) -> int:
        return int(self._common("k_head_dim"))

    @property
    def v_head_dim(self) -> int:
        return int(self._common("v_head_dim"))

    @property
    def rotary(self) -> Rotary:
        rotary: Rotary = self._common("rotary")
        return rotary

    def _common(self, name: str) -> Any:
        values = {getattr(group, name) for group in self.groups}
        if len(values) > 1:
            raise InvalidLayout(f"the layer groups of this layout differ in {name}: read it per group", field=name)
        return values.pop()

    @property
    def bytes_per_token(self) -> int:
        """KV bytes of one token, over all layers and heads."""
        return sum(group.layers * group.slice_bytes(group.kv_heads, 1) for group in self.groups)

    def group_of(self, layer: int) -> LayerGroup:
        """The group of a layer, counted from the model's first."""
        return self._group_of_layer[layer]

    def heads_of(self, shard: Shard, layer: int) -> tuple[int, int]:
        """The half-open range of a layer's own KV heads that belong to a shard.

        A shard's head range refers to the layout's `kv_heads`. A layer with fewer heads is divided in the same
        proportion. If that divides a head, both neighbours have it, as engines replicate heads if there are
        more ranks than heads.
        """
        return self.heads_between(layer, shard.head_begin, shard.head_end)

    def heads_between(self, layer: int, begin: int, end: int) -> tuple[int, int]:
        """`heads_of` for the head range `begin` to `end` of a shard."""
        heads, scale = self._group_of_layer[layer].kv_heads, self._kv_heads
        return begin * heads // scale, -(-end * heads // scale)

    def slice_bytes(self, heads: int, tokens: int) -> int:
        """Bytes of one layer of a block with `tokens` tokens, for `heads` heads.

        Raises InvalidLayout if the layers differ in size: use `shard_slice_bytes`.
        """
        sizes = {group.slice_bytes(heads, tokens) for group in self.groups}
        if len(sizes) > 1:
            raise InvalidLayout("the layers of this layout differ in size: use shard_slice_bytes", field="layers")
        return sizes.pop()

    def shard_slice_bytes(self, shard: Shard, layer: int, tokens: int) -> int:
        """Bytes of a shard's part of one layer, counted from the model's first, of a block with `tokens` tokens."""
        begin, end = self.heads_of(shard, layer)
        return self._group_of_layer[layer].slice_bytes(end - begin, tokens)

    def encode(self) -> bytes:
        """The canonical encoding: fields in order, u32 lengths before text, numbers big-endian.

        One group without a window has the encoding of the first version, so that its fingerprint stays the same.
        """
        if len(self.groups) == 1 and not self.groups[0].window:
            (group,) = self.groups
            dims = (group.layers, group.kv_heads, group.k_head_dim, group.v_head_dim, self.block_tokens)
            texts = (self.model_id, self.model_revision, group.dtype)
            head = [_LAYOUT_TAG, *map(_text, texts), struct.pack(">5I?", *dims, self.rotated)]
            return b"".join([*head, *_encoded(group.rotary)])
        parts = [_GROUPS_TAG, _text(self.model_id), _text(self.model_revision)]
        parts.append(struct.pack(">I?I", self.block_tokens, self.rotated, len(self.groups)))
        for group in self.groups:
            dims = (group.layers, group.kv_heads, group.k_head_dim, group.v_head_dim, group.window)
            parts += [_text(group.dtype), struct.pack(">5I", *dims), *_encoded(group.rotary)]
        return b"".join(parts)

    def to_proto(self) -> pb.Layout:
        """The message. One group without a window uses the fields of the first version, else `groups` is set."""
        about, first = _fields(self, _LAYOUT_FIELDS), self.groups[0]
        if len(self.groups) > 1 or first.window:
            return pb.Layout(**about, groups=map(_group_to_proto, self.groups))
        return pb.Layout(**about, **_fields(first, _GEOMETRY_FIELDS), rotary=_rotary_to_proto(first.rotary))

    @classmethod
    def from_proto(cls, message: pb.Layout, fingerprint: bytes | None = None) -> Layout:
        """The layout in a message. Raises InvalidLayout, or LayoutMismatch for another fingerprint."""
        if len(message.groups) > _LAYERS_MAX:
            raise InvalidLayout(f"there are {len(message.groups)} groups; the limit is {_LAYERS_MAX}", field="groups")
        about = _fields(message, _LAYOUT_FIELDS)
        if message.groups:
            layout = cls(**about, groups=[_group_from_proto(group) for group in message.groups])
        else:
            layout = cls(**about, **_fields(message, _GEOMETRY_FIELDS), rotary=_rotary_from_proto(message.rotary))
        if fingerprint is not None and fingerprint != layout.fingerprint:
            raise LayoutMismatch(
                f"the layout's fingerprint is {layout.fingerprint.hex()}, not {fingerprint.hex() or 'empty'}",
                expected=layout.fingerprint.hex(),
            )
        return layout


@dataclass(frozen=True, slots=True, order=True)
class Shard:
    """The part of a block that one rank stores: half-open ranges of layers and KV heads.

    The head range refers to the layout's `kv_heads`; `Layout.heads_of` converts it for layers with fewer heads.
    """

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
        """Returns itself. Raises InvalidRequest if the shard is empty or not within the layout."""
        layers_fit = 0 <= self.layer_begin < self.layer_end <= layout.layers
        heads_fit = 0 <= self.head_begin < self.head_end <= layout.kv_heads
        if not (layers_fit and heads_fit):
            raise InvalidRequest(
                f"shard layers {self.layer_begin}..{self.layer_end}, heads {self.head_begin}..{self.head_end} "
                f"is not within {layout.layers} layers and {layout.kv_heads} heads",
                field="shard",
            )
        return self

    def encode(self) -> bytes:
        """8 bytes, big-endian. In the index they follow the block key."""
        return self._STRUCT.pack(self.layer_begin, self.layer_end, self.head_begin, self.head_end)

    @classmethod
    def decode(cls, data: bytes) -> Shard:
        return cls(*cls._STRUCT.unpack(data))

    def to_proto(self) -> pb.Shard:
        return pb.Shard(**_fields(self, _SHARD_FIELDS))

    @classmethod
    def from_proto(cls, message: pb.Shard) -> Shard:
        return cls(message.layer_begin, message.layer_end, message.head_begin, message.head_end)


def _check_number(name: str, value: object, least: int, limit: int) -> None:
    if not isinstance(value, int) or not least <= value <= limit:
        raise InvalidLayout(f"{name} is {value!r}; it must be in {least}..{limit}", field=name)


def _joined(groups: Sequence[LayerGroup]) -> tuple[LayerGroup, ...]:
    """Joins equal neighbours to one group, so that the same layers have the same encoding."""
    joined: list[LayerGroup] = []
    for group in groups:
        if joined and replace(joined[-1], layers=group.layers) == group:
            joined[-1] = replace(group, layers=joined[-1].layers + group.layers)
        else:
            joined.append(group)
    return tuple(joined)


# Fields with the same names in a message and in its value.
_LAYOUT_FIELDS = ("model_id", "model_revision", "block_tokens", "rotated")
_GEOMETRY_FIELDS = ("layers", "kv_heads", "k_head_dim", "v_head_dim", "dtype")
_ROTARY_FIELDS = ("kind", "pairing", "dims", "base")
_SHARD_FIELDS = ("layer_begin", "layer_end", "head_begin", "head_end")


def _fields(source: object, names: Sequence[str]) -> dict[str, Any]:
    return {name: getattr(source, name) for name in names}


def _group_to_proto(group: LayerGroup) -> pb.LayerGroup:
    geometry = _fields(group, _GEOMETRY_FIELDS)
    return pb.LayerGroup(**geometry, window=group.window, rotary=_rotary_to_proto(group.rotary))


def _group_from_proto(message: pb.LayerGroup) -> LayerGroup:
    geometry = _fields(message, _GEOMETRY_FIELDS)
    return LayerGroup(**geometry, window=message.window, rotary=_rotary_from_proto(message.rotary))


def _rotary_to_proto(rotary: Rotary) -> pb.Rotary:
    return pb.Rotary(**_fields(rotary, _ROTARY_FIELDS), parameters=dict(rotary.parameters))


def _rotary_from_proto(message: pb.Rotary) -> Rotary:
    return Rotary(**_fields(message, _ROTARY_FIELDS), parameters=tuple(message.parameters.items()))


def _encoded(rotary: Rotary) -> list[bytes]:
    numbers = struct.pack(">IdI", rotary.dims, rotary.base, len(rotary.parameters))
    parts = [_text(rotary.kind), _text(rotary.pairing), numbers]
    for name, value in rotary.parameters:
        parts += [_text(name), struct.pack(">d", value)]
    return parts


def _text(value: str) -> bytes:
    data = value.encode()
    return struct.pack(">I", len(data)) + data
