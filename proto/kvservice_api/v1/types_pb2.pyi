from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Tier(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TIER_UNSPECIFIED: _ClassVar[Tier]
    TIER_DRAM: _ClassVar[Tier]
    TIER_SSD: _ClassVar[Tier]
    TIER_NAMED: _ClassVar[Tier]

class Durability(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DURABILITY_UNSPECIFIED: _ClassVar[Durability]
    DURABILITY_DRAM: _ClassVar[Durability]
    DURABILITY_SSD: _ClassVar[Durability]
TIER_UNSPECIFIED: Tier
TIER_DRAM: Tier
TIER_SSD: Tier
TIER_NAMED: Tier
DURABILITY_UNSPECIFIED: Durability
DURABILITY_DRAM: Durability
DURABILITY_SSD: Durability

class Rotary(_message.Message):
    __slots__ = ("kind", "pairing", "dims", "base", "parameters")
    class ParametersEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    KIND_FIELD_NUMBER: _ClassVar[int]
    PAIRING_FIELD_NUMBER: _ClassVar[int]
    DIMS_FIELD_NUMBER: _ClassVar[int]
    BASE_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    kind: str
    pairing: str
    dims: int
    base: float
    parameters: _containers.ScalarMap[str, float]
    def __init__(self, kind: _Optional[str] = ..., pairing: _Optional[str] = ..., dims: _Optional[int] = ..., base: _Optional[float] = ..., parameters: _Optional[_Mapping[str, float]] = ...) -> None: ...

class LayerGroup(_message.Message):
    __slots__ = ("layers", "kv_heads", "k_head_dim", "v_head_dim", "dtype", "window", "rotary")
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    KV_HEADS_FIELD_NUMBER: _ClassVar[int]
    K_HEAD_DIM_FIELD_NUMBER: _ClassVar[int]
    V_HEAD_DIM_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    WINDOW_FIELD_NUMBER: _ClassVar[int]
    ROTARY_FIELD_NUMBER: _ClassVar[int]
    layers: int
    kv_heads: int
    k_head_dim: int
    v_head_dim: int
    dtype: str
    window: int
    rotary: Rotary
    def __init__(self, layers: _Optional[int] = ..., kv_heads: _Optional[int] = ..., k_head_dim: _Optional[int] = ..., v_head_dim: _Optional[int] = ..., dtype: _Optional[str] = ..., window: _Optional[int] = ..., rotary: _Optional[_Union[Rotary, _Mapping]] = ...) -> None: ...

class Layout(_message.Message):
    __slots__ = ("model_id", "model_revision", "dtype", "layers", "kv_heads", "k_head_dim", "v_head_dim", "block_tokens", "rotary", "rotated", "groups")
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_REVISION_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    KV_HEADS_FIELD_NUMBER: _ClassVar[int]
    K_HEAD_DIM_FIELD_NUMBER: _ClassVar[int]
    V_HEAD_DIM_FIELD_NUMBER: _ClassVar[int]
    BLOCK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ROTARY_FIELD_NUMBER: _ClassVar[int]
    ROTATED_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    model_id: str
    model_revision: str
    dtype: str
    layers: int
    kv_heads: int
    k_head_dim: int
    v_head_dim: int
    block_tokens: int
    rotary: Rotary
    rotated: bool
    groups: _containers.RepeatedCompositeFieldContainer[LayerGroup]
    def __init__(self, model_id: _Optional[str] = ..., model_revision: _Optional[str] = ..., dtype: _Optional[str] = ..., layers: _Optional[int] = ..., kv_heads: _Optional[int] = ..., k_head_dim: _Optional[int] = ..., v_head_dim: _Optional[int] = ..., block_tokens: _Optional[int] = ..., rotary: _Optional[_Union[Rotary, _Mapping]] = ..., rotated: bool = ..., groups: _Optional[_Iterable[_Union[LayerGroup, _Mapping]]] = ...) -> None: ...

class Shard(_message.Message):
    __slots__ = ("layer_begin", "layer_end", "head_begin", "head_end")
    LAYER_BEGIN_FIELD_NUMBER: _ClassVar[int]
    LAYER_END_FIELD_NUMBER: _ClassVar[int]
    HEAD_BEGIN_FIELD_NUMBER: _ClassVar[int]
    HEAD_END_FIELD_NUMBER: _ClassVar[int]
    layer_begin: int
    layer_end: int
    head_begin: int
    head_end: int
    def __init__(self, layer_begin: _Optional[int] = ..., layer_end: _Optional[int] = ..., head_begin: _Optional[int] = ..., head_end: _Optional[int] = ...) -> None: ...

class SessionName(_message.Message):
    __slots__ = ("session_id", "layout_fingerprint")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    layout_fingerprint: bytes
    def __init__(self, session_id: _Optional[str] = ..., layout_fingerprint: _Optional[bytes] = ...) -> None: ...
