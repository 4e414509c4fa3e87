import datetime

from google.protobuf import timestamp_pb2 as _timestamp_pb2
from kvservice_api.v1 import sessions_pb2 as _sessions_pb2
from kvservice_api.v1 import types_pb2 as _types_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class StatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StatusResponse(_message.Message):
    __slots__ = ("version", "store_id", "boot_epoch", "started_at", "state", "dram", "ssd", "index", "blocks", "layouts", "clients", "leases", "uploads", "counters", "sessions")
    class CountersEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    VERSION_FIELD_NUMBER: _ClassVar[int]
    STORE_ID_FIELD_NUMBER: _ClassVar[int]
    BOOT_EPOCH_FIELD_NUMBER: _ClassVar[int]
    STARTED_AT_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    DRAM_FIELD_NUMBER: _ClassVar[int]
    SSD_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    LAYOUTS_FIELD_NUMBER: _ClassVar[int]
    CLIENTS_FIELD_NUMBER: _ClassVar[int]
    LEASES_FIELD_NUMBER: _ClassVar[int]
    UPLOADS_FIELD_NUMBER: _ClassVar[int]
    COUNTERS_FIELD_NUMBER: _ClassVar[int]
    SESSIONS_FIELD_NUMBER: _ClassVar[int]
    version: str
    store_id: bytes
    boot_epoch: int
    started_at: _timestamp_pb2.Timestamp
    state: str
    dram: TierStatus
    ssd: TierStatus
    index: IndexStatus
    blocks: int
    layouts: int
    clients: int
    leases: int
    uploads: int
    counters: _containers.ScalarMap[str, float]
    sessions: int
    def __init__(self, version: _Optional[str] = ..., store_id: _Optional[bytes] = ..., boot_epoch: _Optional[int] = ..., started_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., state: _Optional[str] = ..., dram: _Optional[_Union[TierStatus, _Mapping]] = ..., ssd: _Optional[_Union[TierStatus, _Mapping]] = ..., index: _Optional[_Union[IndexStatus, _Mapping]] = ..., blocks: _Optional[int] = ..., layouts: _Optional[int] = ..., clients: _Optional[int] = ..., leases: _Optional[int] = ..., uploads: _Optional[int] = ..., counters: _Optional[_Mapping[str, float]] = ..., sessions: _Optional[int] = ...) -> None: ...

class TierStatus(_message.Message):
    __slots__ = ("capacity_bytes", "used_bytes", "blocks", "refusing_because")
    CAPACITY_BYTES_FIELD_NUMBER: _ClassVar[int]
    USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    REFUSING_BECAUSE_FIELD_NUMBER: _ClassVar[int]
    capacity_bytes: int
    used_bytes: int
    blocks: int
    refusing_because: str
    def __init__(self, capacity_bytes: _Optional[int] = ..., used_bytes: _Optional[int] = ..., blocks: _Optional[int] = ..., refusing_because: _Optional[str] = ...) -> None: ...

class IndexStatus(_message.Message):
    __slots__ = ("durable_map_bytes", "durable_used_bytes", "volatile_map_bytes", "volatile_used_bytes")
    DURABLE_MAP_BYTES_FIELD_NUMBER: _ClassVar[int]
    DURABLE_USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    VOLATILE_MAP_BYTES_FIELD_NUMBER: _ClassVar[int]
    VOLATILE_USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    durable_map_bytes: int
    durable_used_bytes: int
    volatile_map_bytes: int
    volatile_used_bytes: int
    def __init__(self, durable_map_bytes: _Optional[int] = ..., durable_used_bytes: _Optional[int] = ..., volatile_map_bytes: _Optional[int] = ..., volatile_used_bytes: _Optional[int] = ...) -> None: ...

class ListBlocksRequest(_message.Message):
    __slots__ = ("layout_fingerprint", "tier", "page_size", "page_token")
    LAYOUT_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    layout_fingerprint: bytes
    tier: _types_pb2.Tier
    page_size: int
    page_token: str
    def __init__(self, layout_fingerprint: _Optional[bytes] = ..., tier: _Optional[_Union[_types_pb2.Tier, str]] = ..., page_size: _Optional[int] = ..., page_token: _Optional[str] = ...) -> None: ...

class ListBlocksResponse(_message.Message):
    __slots__ = ("blocks", "next_page_token")
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    blocks: _containers.RepeatedCompositeFieldContainer[StoredBlock]
    next_page_token: str
    def __init__(self, blocks: _Optional[_Iterable[_Union[StoredBlock, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class StoredBlock(_message.Message):
    __slots__ = ("key", "parent_key", "layout_fingerprint", "shard", "token_count", "size_bytes", "in_dram", "on_ssd", "stored_at", "used_at", "hits", "leases")
    KEY_FIELD_NUMBER: _ClassVar[int]
    PARENT_KEY_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    SHARD_FIELD_NUMBER: _ClassVar[int]
    TOKEN_COUNT_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    IN_DRAM_FIELD_NUMBER: _ClassVar[int]
    ON_SSD_FIELD_NUMBER: _ClassVar[int]
    STORED_AT_FIELD_NUMBER: _ClassVar[int]
    USED_AT_FIELD_NUMBER: _ClassVar[int]
    HITS_FIELD_NUMBER: _ClassVar[int]
    LEASES_FIELD_NUMBER: _ClassVar[int]
    key: bytes
    parent_key: bytes
    layout_fingerprint: bytes
    shard: _types_pb2.Shard
    token_count: int
    size_bytes: int
    in_dram: bool
    on_ssd: bool
    stored_at: _timestamp_pb2.Timestamp
    used_at: _timestamp_pb2.Timestamp
    hits: int
    leases: int
    def __init__(self, key: _Optional[bytes] = ..., parent_key: _Optional[bytes] = ..., layout_fingerprint: _Optional[bytes] = ..., shard: _Optional[_Union[_types_pb2.Shard, _Mapping]] = ..., token_count: _Optional[int] = ..., size_bytes: _Optional[int] = ..., in_dram: bool = ..., on_ssd: bool = ..., stored_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., used_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., hits: _Optional[int] = ..., leases: _Optional[int] = ...) -> None: ...

class InspectRequest(_message.Message):
    __slots__ = ("key",)
    KEY_FIELD_NUMBER: _ClassVar[int]
    key: bytes
    def __init__(self, key: _Optional[bytes] = ...) -> None: ...

class InspectResponse(_message.Message):
    __slots__ = ("shards", "layout")
    SHARDS_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    shards: _containers.RepeatedCompositeFieldContainer[StoredBlock]
    layout: _types_pb2.Layout
    def __init__(self, shards: _Optional[_Iterable[_Union[StoredBlock, _Mapping]]] = ..., layout: _Optional[_Union[_types_pb2.Layout, _Mapping]] = ...) -> None: ...

class DiscardRequest(_message.Message):
    __slots__ = ("keys", "layout_fingerprint", "everything")
    KEYS_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    EVERYTHING_FIELD_NUMBER: _ClassVar[int]
    keys: bytes
    layout_fingerprint: bytes
    everything: bool
    def __init__(self, keys: _Optional[bytes] = ..., layout_fingerprint: _Optional[bytes] = ..., everything: bool = ...) -> None: ...

class DiscardResponse(_message.Message):
    __slots__ = ("discarded", "missing")
    DISCARDED_FIELD_NUMBER: _ClassVar[int]
    MISSING_FIELD_NUMBER: _ClassVar[int]
    discarded: int
    missing: int
    def __init__(self, discarded: _Optional[int] = ..., missing: _Optional[int] = ...) -> None: ...

class ScrubRequest(_message.Message):
    __slots__ = ("tier", "bytes_per_second")
    TIER_FIELD_NUMBER: _ClassVar[int]
    BYTES_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    tier: _types_pb2.Tier
    bytes_per_second: int
    def __init__(self, tier: _Optional[_Union[_types_pb2.Tier, str]] = ..., bytes_per_second: _Optional[int] = ...) -> None: ...

class ScrubResponse(_message.Message):
    __slots__ = ("blocks_total", "blocks_checked", "bytes_checked", "damaged", "done")
    BLOCKS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_CHECKED_FIELD_NUMBER: _ClassVar[int]
    BYTES_CHECKED_FIELD_NUMBER: _ClassVar[int]
    DAMAGED_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    blocks_total: int
    blocks_checked: int
    bytes_checked: int
    damaged: int
    done: bool
    def __init__(self, blocks_total: _Optional[int] = ..., blocks_checked: _Optional[int] = ..., bytes_checked: _Optional[int] = ..., damaged: _Optional[int] = ..., done: bool = ...) -> None: ...

class ListSessionsRequest(_message.Message):
    __slots__ = ("session_id", "layout_fingerprint", "page_size", "page_token")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    layout_fingerprint: bytes
    page_size: int
    page_token: str
    def __init__(self, session_id: _Optional[str] = ..., layout_fingerprint: _Optional[bytes] = ..., page_size: _Optional[int] = ..., page_token: _Optional[str] = ...) -> None: ...

class ListSessionsResponse(_message.Message):
    __slots__ = ("sessions", "next_page_token")
    SESSIONS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    sessions: _containers.RepeatedCompositeFieldContainer[_sessions_pb2.Session]
    next_page_token: str
    def __init__(self, sessions: _Optional[_Iterable[_Union[_sessions_pb2.Session, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...
