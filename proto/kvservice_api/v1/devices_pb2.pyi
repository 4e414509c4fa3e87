from kvservice_api.v1 import blocks_pb2 as _blocks_pb2
from kvservice_api.v1 import types_pb2 as _types_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class RegisterMemoryRequest(_message.Message):
    __slots__ = ("client_id", "layout_fingerprint", "shard", "pci_bus_id", "allocations", "layers", "fence")
    CLIENT_ID_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    SHARD_FIELD_NUMBER: _ClassVar[int]
    PCI_BUS_ID_FIELD_NUMBER: _ClassVar[int]
    ALLOCATIONS_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    FENCE_FIELD_NUMBER: _ClassVar[int]
    client_id: bytes
    layout_fingerprint: bytes
    shard: _types_pb2.Shard
    pci_bus_id: str
    allocations: _containers.RepeatedScalarFieldContainer[bytes]
    layers: _containers.RepeatedCompositeFieldContainer[LayerPages]
    fence: FenceWords
    def __init__(self, client_id: _Optional[bytes] = ..., layout_fingerprint: _Optional[bytes] = ..., shard: _Optional[_Union[_types_pb2.Shard, _Mapping]] = ..., pci_bus_id: _Optional[str] = ..., allocations: _Optional[_Iterable[bytes]] = ..., layers: _Optional[_Iterable[_Union[LayerPages, _Mapping]]] = ..., fence: _Optional[_Union[FenceWords, _Mapping]] = ...) -> None: ...

class LayerPages(_message.Message):
    __slots__ = ("keys", "values", "pages", "page_tokens", "group")
    KEYS_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    PAGES_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    keys: PageArray
    values: PageArray
    pages: int
    page_tokens: int
    group: int
    def __init__(self, keys: _Optional[_Union[PageArray, _Mapping]] = ..., values: _Optional[_Union[PageArray, _Mapping]] = ..., pages: _Optional[int] = ..., page_tokens: _Optional[int] = ..., group: _Optional[int] = ...) -> None: ...

class PageArray(_message.Message):
    __slots__ = ("allocation", "offset_bytes", "page_stride", "head_stride", "token_stride", "dim_stride")
    ALLOCATION_FIELD_NUMBER: _ClassVar[int]
    OFFSET_BYTES_FIELD_NUMBER: _ClassVar[int]
    PAGE_STRIDE_FIELD_NUMBER: _ClassVar[int]
    HEAD_STRIDE_FIELD_NUMBER: _ClassVar[int]
    TOKEN_STRIDE_FIELD_NUMBER: _ClassVar[int]
    DIM_STRIDE_FIELD_NUMBER: _ClassVar[int]
    allocation: int
    offset_bytes: int
    page_stride: int
    head_stride: int
    token_stride: int
    dim_stride: int
    def __init__(self, allocation: _Optional[int] = ..., offset_bytes: _Optional[int] = ..., page_stride: _Optional[int] = ..., head_stride: _Optional[int] = ..., token_stride: _Optional[int] = ..., dim_stride: _Optional[int] = ...) -> None: ...

class FenceWords(_message.Message):
    __slots__ = ("allocation", "offset_bytes", "count")
    ALLOCATION_FIELD_NUMBER: _ClassVar[int]
    OFFSET_BYTES_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    allocation: int
    offset_bytes: int
    count: int
    def __init__(self, allocation: _Optional[int] = ..., offset_bytes: _Optional[int] = ..., count: _Optional[int] = ...) -> None: ...

class RegisterMemoryResponse(_message.Message):
    __slots__ = ("registration_id",)
    REGISTRATION_ID_FIELD_NUMBER: _ClassVar[int]
    registration_id: int
    def __init__(self, registration_id: _Optional[int] = ...) -> None: ...

class UnregisterMemoryRequest(_message.Message):
    __slots__ = ("client_id", "registration_id")
    CLIENT_ID_FIELD_NUMBER: _ClassVar[int]
    REGISTRATION_ID_FIELD_NUMBER: _ClassVar[int]
    client_id: bytes
    registration_id: int
    def __init__(self, client_id: _Optional[bytes] = ..., registration_id: _Optional[int] = ...) -> None: ...

class UnregisterMemoryResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class PageIds(_message.Message):
    __slots__ = ("ids",)
    IDS_FIELD_NUMBER: _ClassVar[int]
    ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, ids: _Optional[_Iterable[int]] = ...) -> None: ...

class LoadToDeviceRequest(_message.Message):
    __slots__ = ("client_id", "registration_id", "lease_id", "first_block", "block_count", "first_token", "groups", "begin_tokens", "end_token", "fence_word", "fence_value")
    CLIENT_ID_FIELD_NUMBER: _ClassVar[int]
    REGISTRATION_ID_FIELD_NUMBER: _ClassVar[int]
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    FIRST_BLOCK_FIELD_NUMBER: _ClassVar[int]
    BLOCK_COUNT_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    BEGIN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    END_TOKEN_FIELD_NUMBER: _ClassVar[int]
    FENCE_WORD_FIELD_NUMBER: _ClassVar[int]
    FENCE_VALUE_FIELD_NUMBER: _ClassVar[int]
    client_id: bytes
    registration_id: int
    lease_id: int
    first_block: int
    block_count: int
    first_token: int
    groups: _containers.RepeatedCompositeFieldContainer[PageIds]
    begin_tokens: _containers.RepeatedScalarFieldContainer[int]
    end_token: int
    fence_word: int
    fence_value: int
    def __init__(self, client_id: _Optional[bytes] = ..., registration_id: _Optional[int] = ..., lease_id: _Optional[int] = ..., first_block: _Optional[int] = ..., block_count: _Optional[int] = ..., first_token: _Optional[int] = ..., groups: _Optional[_Iterable[_Union[PageIds, _Mapping]]] = ..., begin_tokens: _Optional[_Iterable[int]] = ..., end_token: _Optional[int] = ..., fence_word: _Optional[int] = ..., fence_value: _Optional[int] = ...) -> None: ...

class LoadToDeviceResponse(_message.Message):
    __slots__ = ("layers_copied",)
    LAYERS_COPIED_FIELD_NUMBER: _ClassVar[int]
    layers_copied: int
    def __init__(self, layers_copied: _Optional[int] = ...) -> None: ...

class SaveFromDeviceRequest(_message.Message):
    __slots__ = ("begin", "commit")
    BEGIN_FIELD_NUMBER: _ClassVar[int]
    COMMIT_FIELD_NUMBER: _ClassVar[int]
    begin: SaveFromDeviceBegin
    commit: bool
    def __init__(self, begin: _Optional[_Union[SaveFromDeviceBegin, _Mapping]] = ..., commit: bool = ...) -> None: ...

class SaveFromDeviceBegin(_message.Message):
    __slots__ = ("header", "registration_id", "chains")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    REGISTRATION_ID_FIELD_NUMBER: _ClassVar[int]
    CHAINS_FIELD_NUMBER: _ClassVar[int]
    header: _blocks_pb2.SaveHeader
    registration_id: int
    chains: _containers.RepeatedCompositeFieldContainer[ChainPages]
    def __init__(self, header: _Optional[_Union[_blocks_pb2.SaveHeader, _Mapping]] = ..., registration_id: _Optional[int] = ..., chains: _Optional[_Iterable[_Union[ChainPages, _Mapping]]] = ...) -> None: ...

class ChainPages(_message.Message):
    __slots__ = ("first_token", "groups")
    FIRST_TOKEN_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    first_token: int
    groups: _containers.RepeatedCompositeFieldContainer[PageIds]
    def __init__(self, first_token: _Optional[int] = ..., groups: _Optional[_Iterable[_Union[PageIds, _Mapping]]] = ...) -> None: ...

class SaveFromDeviceResponse(_message.Message):
    __slots__ = ("layers_gathered", "result")
    LAYERS_GATHERED_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    layers_gathered: int
    result: _blocks_pb2.SaveBlocksResponse
    def __init__(self, layers_gathered: _Optional[int] = ..., result: _Optional[_Union[_blocks_pb2.SaveBlocksResponse, _Mapping]] = ...) -> None: ...
