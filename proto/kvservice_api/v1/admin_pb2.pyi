import datetime

from google.protobuf import timestamp_pb2 as _timestamp_pb2
from kvservice_api.v1 import blocks_pb2 as _blocks_pb2
from kvservice_api.v1 import sessions_pb2 as _sessions_pb2
from kvservice_api.v1 import types_pb2 as _types_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Arrival(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ARRIVAL_UNSPECIFIED: _ClassVar[Arrival]
    ARRIVAL_SAVED: _ClassVar[Arrival]
    ARRIVAL_PROMOTED: _ClassVar[Arrival]
    ARRIVAL_WRITTEN_BEHIND: _ClassVar[Arrival]
    ARRIVAL_KEPT: _ClassVar[Arrival]
    ARRIVAL_HINTED: _ClassVar[Arrival]

class EventKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    EVENT_KIND_UNSPECIFIED: _ClassVar[EventKind]
    EVENT_KIND_REFUSED: _ClassVar[EventKind]
    EVENT_KIND_ABANDONED: _ClassVar[EventKind]
    EVENT_KIND_EVICTED: _ClassVar[EventKind]
    EVENT_KIND_EVICTED_ON_REQUEST: _ClassVar[EventKind]
    EVENT_KIND_DISCARDED: _ClassVar[EventKind]
    EVENT_KIND_QUARANTINED: _ClassVar[EventKind]
    EVENT_KIND_LOST: _ClassVar[EventKind]
    EVENT_KIND_EXPIRED: _ClassVar[EventKind]

class SpaceFor(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SPACE_FOR_UNSPECIFIED: _ClassVar[SpaceFor]
    SPACE_FOR_SAVE: _ClassVar[SpaceFor]
    SPACE_FOR_LOAD: _ClassVar[SpaceFor]
    SPACE_FOR_PREFETCH: _ClassVar[SpaceFor]
    SPACE_FOR_READ_AHEAD: _ClassVar[SpaceFor]
    SPACE_FOR_COPY: _ClassVar[SpaceFor]
    SPACE_FOR_FREE_SHARE: _ClassVar[SpaceFor]
    SPACE_FOR_INDEX: _ClassVar[SpaceFor]

class MissReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    MISS_REASON_UNSPECIFIED: _ClassVar[MissReason]
    MISS_REASON_NEVER_STORED: _ClassVar[MissReason]
    MISS_REASON_DROPPED_AT_SAVE: _ClassVar[MissReason]
    MISS_REASON_EVICTED: _ClassVar[MissReason]
    MISS_REASON_EXPIRED: _ClassVar[MissReason]
    MISS_REASON_DISCARDED: _ClassVar[MissReason]
    MISS_REASON_QUARANTINED: _ClassVar[MissReason]
    MISS_REASON_OTHER_LAYOUT: _ClassVar[MissReason]
    MISS_REASON_LOST_IN_RESTART: _ClassVar[MissReason]
    MISS_REASON_NEVER_STORED_OR_LOST: _ClassVar[MissReason]
    MISS_REASON_IN_PART: _ClassVar[MissReason]
    MISS_REASON_BEING_SAVED: _ClassVar[MissReason]

class DrainAction(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DRAIN_ACTION_UNSPECIFIED: _ClassVar[DrainAction]
    DRAIN_ACTION_BEGIN: _ClassVar[DrainAction]
    DRAIN_ACTION_UNDO: _ClassVar[DrainAction]
ARRIVAL_UNSPECIFIED: Arrival
ARRIVAL_SAVED: Arrival
ARRIVAL_PROMOTED: Arrival
ARRIVAL_WRITTEN_BEHIND: Arrival
ARRIVAL_KEPT: Arrival
ARRIVAL_HINTED: Arrival
EVENT_KIND_UNSPECIFIED: EventKind
EVENT_KIND_REFUSED: EventKind
EVENT_KIND_ABANDONED: EventKind
EVENT_KIND_EVICTED: EventKind
EVENT_KIND_EVICTED_ON_REQUEST: EventKind
EVENT_KIND_DISCARDED: EventKind
EVENT_KIND_QUARANTINED: EventKind
EVENT_KIND_LOST: EventKind
EVENT_KIND_EXPIRED: EventKind
SPACE_FOR_UNSPECIFIED: SpaceFor
SPACE_FOR_SAVE: SpaceFor
SPACE_FOR_LOAD: SpaceFor
SPACE_FOR_PREFETCH: SpaceFor
SPACE_FOR_READ_AHEAD: SpaceFor
SPACE_FOR_COPY: SpaceFor
SPACE_FOR_FREE_SHARE: SpaceFor
SPACE_FOR_INDEX: SpaceFor
MISS_REASON_UNSPECIFIED: MissReason
MISS_REASON_NEVER_STORED: MissReason
MISS_REASON_DROPPED_AT_SAVE: MissReason
MISS_REASON_EVICTED: MissReason
MISS_REASON_EXPIRED: MissReason
MISS_REASON_DISCARDED: MissReason
MISS_REASON_QUARANTINED: MissReason
MISS_REASON_OTHER_LAYOUT: MissReason
MISS_REASON_LOST_IN_RESTART: MissReason
MISS_REASON_NEVER_STORED_OR_LOST: MissReason
MISS_REASON_IN_PART: MissReason
MISS_REASON_BEING_SAVED: MissReason
DRAIN_ACTION_UNSPECIFIED: DrainAction
DRAIN_ACTION_BEGIN: DrainAction
DRAIN_ACTION_UNDO: DrainAction

class SetPolicyRequest(_message.Message):
    __slots__ = ("policy", "shadow")
    POLICY_FIELD_NUMBER: _ClassVar[int]
    SHADOW_FIELD_NUMBER: _ClassVar[int]
    policy: str
    shadow: str
    def __init__(self, policy: _Optional[str] = ..., shadow: _Optional[str] = ...) -> None: ...

class SetPolicyResponse(_message.Message):
    __slots__ = ("policy", "since", "configured", "items", "blocks", "queued_items", "ranking_ms", "look_ms", "read_ahead_bytes", "read_ahead_unused", "shadow")
    POLICY_FIELD_NUMBER: _ClassVar[int]
    SINCE_FIELD_NUMBER: _ClassVar[int]
    CONFIGURED_FIELD_NUMBER: _ClassVar[int]
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    QUEUED_ITEMS_FIELD_NUMBER: _ClassVar[int]
    RANKING_MS_FIELD_NUMBER: _ClassVar[int]
    LOOK_MS_FIELD_NUMBER: _ClassVar[int]
    READ_AHEAD_BYTES_FIELD_NUMBER: _ClassVar[int]
    READ_AHEAD_UNUSED_FIELD_NUMBER: _ClassVar[int]
    SHADOW_FIELD_NUMBER: _ClassVar[int]
    policy: str
    since: _timestamp_pb2.Timestamp
    configured: str
    items: int
    blocks: int
    queued_items: int
    ranking_ms: float
    look_ms: float
    read_ahead_bytes: int
    read_ahead_unused: float
    shadow: ShadowPolicy
    def __init__(self, policy: _Optional[str] = ..., since: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., configured: _Optional[str] = ..., items: _Optional[int] = ..., blocks: _Optional[int] = ..., queued_items: _Optional[int] = ..., ranking_ms: _Optional[float] = ..., look_ms: _Optional[float] = ..., read_ahead_bytes: _Optional[int] = ..., read_ahead_unused: _Optional[float] = ..., shadow: _Optional[_Union[ShadowPolicy, _Mapping]] = ...) -> None: ...

class ShadowPolicy(_message.Message):
    __slots__ = ("policy", "since", "requests", "real", "shadow")
    POLICY_FIELD_NUMBER: _ClassVar[int]
    SINCE_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    REAL_FIELD_NUMBER: _ClassVar[int]
    SHADOW_FIELD_NUMBER: _ClassVar[int]
    policy: str
    since: _timestamp_pb2.Timestamp
    requests: int
    real: RequestsFound
    shadow: RequestsFound
    def __init__(self, policy: _Optional[str] = ..., since: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., requests: _Optional[int] = ..., real: _Optional[_Union[RequestsFound, _Mapping]] = ..., shadow: _Optional[_Union[RequestsFound, _Mapping]] = ...) -> None: ...

class RequestsFound(_message.Message):
    __slots__ = ("requests_in_dram", "dram_bytes", "ssd_bytes", "missing_bytes", "read_ahead_bytes")
    REQUESTS_IN_DRAM_FIELD_NUMBER: _ClassVar[int]
    DRAM_BYTES_FIELD_NUMBER: _ClassVar[int]
    SSD_BYTES_FIELD_NUMBER: _ClassVar[int]
    MISSING_BYTES_FIELD_NUMBER: _ClassVar[int]
    READ_AHEAD_BYTES_FIELD_NUMBER: _ClassVar[int]
    requests_in_dram: int
    dram_bytes: int
    ssd_bytes: int
    missing_bytes: int
    read_ahead_bytes: int
    def __init__(self, requests_in_dram: _Optional[int] = ..., dram_bytes: _Optional[int] = ..., ssd_bytes: _Optional[int] = ..., missing_bytes: _Optional[int] = ..., read_ahead_bytes: _Optional[int] = ...) -> None: ...

class StatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StatusResponse(_message.Message):
    __slots__ = ("version", "store_id", "boot_epoch", "started_at", "state", "dram", "ssd", "index", "blocks", "layouts", "clients", "leases", "uploads", "counters", "sessions", "set_aside_bytes", "set_aside_extents", "tiers", "hint_streams", "queued_requests", "recordings", "cuda")
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
    SET_ASIDE_BYTES_FIELD_NUMBER: _ClassVar[int]
    SET_ASIDE_EXTENTS_FIELD_NUMBER: _ClassVar[int]
    TIERS_FIELD_NUMBER: _ClassVar[int]
    HINT_STREAMS_FIELD_NUMBER: _ClassVar[int]
    QUEUED_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    RECORDINGS_FIELD_NUMBER: _ClassVar[int]
    CUDA_FIELD_NUMBER: _ClassVar[int]
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
    set_aside_bytes: int
    set_aside_extents: int
    tiers: _containers.RepeatedCompositeFieldContainer[TierStatus]
    hint_streams: int
    queued_requests: int
    recordings: int
    cuda: CudaStatus
    def __init__(self, version: _Optional[str] = ..., store_id: _Optional[bytes] = ..., boot_epoch: _Optional[int] = ..., started_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., state: _Optional[str] = ..., dram: _Optional[_Union[TierStatus, _Mapping]] = ..., ssd: _Optional[_Union[TierStatus, _Mapping]] = ..., index: _Optional[_Union[IndexStatus, _Mapping]] = ..., blocks: _Optional[int] = ..., layouts: _Optional[int] = ..., clients: _Optional[int] = ..., leases: _Optional[int] = ..., uploads: _Optional[int] = ..., counters: _Optional[_Mapping[str, float]] = ..., sessions: _Optional[int] = ..., set_aside_bytes: _Optional[int] = ..., set_aside_extents: _Optional[int] = ..., tiers: _Optional[_Iterable[_Union[TierStatus, _Mapping]]] = ..., hint_streams: _Optional[int] = ..., queued_requests: _Optional[int] = ..., recordings: _Optional[int] = ..., cuda: _Optional[_Union[CudaStatus, _Mapping]] = ...) -> None: ...

class CudaStatus(_message.Message):
    __slots__ = ("refused_because", "registrations", "arena_registered_bytes", "failed")
    REFUSED_BECAUSE_FIELD_NUMBER: _ClassVar[int]
    REGISTRATIONS_FIELD_NUMBER: _ClassVar[int]
    ARENA_REGISTERED_BYTES_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    refused_because: str
    registrations: int
    arena_registered_bytes: int
    failed: bool
    def __init__(self, refused_because: _Optional[str] = ..., registrations: _Optional[int] = ..., arena_registered_bytes: _Optional[int] = ..., failed: bool = ...) -> None: ...

class TierStatus(_message.Message):
    __slots__ = ("capacity_bytes", "used_bytes", "blocks", "refusing_because", "configured_bytes", "short_because", "name")
    CAPACITY_BYTES_FIELD_NUMBER: _ClassVar[int]
    USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    REFUSING_BECAUSE_FIELD_NUMBER: _ClassVar[int]
    CONFIGURED_BYTES_FIELD_NUMBER: _ClassVar[int]
    SHORT_BECAUSE_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    capacity_bytes: int
    used_bytes: int
    blocks: int
    refusing_because: str
    configured_bytes: int
    short_because: str
    name: str
    def __init__(self, capacity_bytes: _Optional[int] = ..., used_bytes: _Optional[int] = ..., blocks: _Optional[int] = ..., refusing_because: _Optional[str] = ..., configured_bytes: _Optional[int] = ..., short_because: _Optional[str] = ..., name: _Optional[str] = ...) -> None: ...

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
    __slots__ = ("layout_fingerprint", "tier", "tier_name", "page_size", "page_token", "key_prefix")
    LAYOUT_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    TIER_NAME_FIELD_NUMBER: _ClassVar[int]
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    KEY_PREFIX_FIELD_NUMBER: _ClassVar[int]
    layout_fingerprint: bytes
    tier: _types_pb2.Tier
    tier_name: str
    page_size: int
    page_token: str
    key_prefix: str
    def __init__(self, layout_fingerprint: _Optional[bytes] = ..., tier: _Optional[_Union[_types_pb2.Tier, str]] = ..., tier_name: _Optional[str] = ..., page_size: _Optional[int] = ..., page_token: _Optional[str] = ..., key_prefix: _Optional[str] = ...) -> None: ...

class ListBlocksResponse(_message.Message):
    __slots__ = ("blocks", "next_page_token")
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    blocks: _containers.RepeatedCompositeFieldContainer[StoredBlock]
    next_page_token: str
    def __init__(self, blocks: _Optional[_Iterable[_Union[StoredBlock, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class StoredBlock(_message.Message):
    __slots__ = ("key", "parent_key", "layout_fingerprint", "shard", "token_count", "size_bytes", "in_dram", "on_ssd", "tiers", "stored_at", "used_at", "hits", "leases", "pinned_until")
    KEY_FIELD_NUMBER: _ClassVar[int]
    PARENT_KEY_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    SHARD_FIELD_NUMBER: _ClassVar[int]
    TOKEN_COUNT_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    IN_DRAM_FIELD_NUMBER: _ClassVar[int]
    ON_SSD_FIELD_NUMBER: _ClassVar[int]
    TIERS_FIELD_NUMBER: _ClassVar[int]
    STORED_AT_FIELD_NUMBER: _ClassVar[int]
    USED_AT_FIELD_NUMBER: _ClassVar[int]
    HITS_FIELD_NUMBER: _ClassVar[int]
    LEASES_FIELD_NUMBER: _ClassVar[int]
    PINNED_UNTIL_FIELD_NUMBER: _ClassVar[int]
    key: bytes
    parent_key: bytes
    layout_fingerprint: bytes
    shard: _types_pb2.Shard
    token_count: int
    size_bytes: int
    in_dram: bool
    on_ssd: bool
    tiers: _containers.RepeatedScalarFieldContainer[str]
    stored_at: _timestamp_pb2.Timestamp
    used_at: _timestamp_pb2.Timestamp
    hits: int
    leases: int
    pinned_until: _timestamp_pb2.Timestamp
    def __init__(self, key: _Optional[bytes] = ..., parent_key: _Optional[bytes] = ..., layout_fingerprint: _Optional[bytes] = ..., shard: _Optional[_Union[_types_pb2.Shard, _Mapping]] = ..., token_count: _Optional[int] = ..., size_bytes: _Optional[int] = ..., in_dram: bool = ..., on_ssd: bool = ..., tiers: _Optional[_Iterable[str]] = ..., stored_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., used_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., hits: _Optional[int] = ..., leases: _Optional[int] = ..., pinned_until: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ...) -> None: ...

class ListLayoutsRequest(_message.Message):
    __slots__ = ("page_size", "page_token")
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    page_size: int
    page_token: str
    def __init__(self, page_size: _Optional[int] = ..., page_token: _Optional[str] = ...) -> None: ...

class ListLayoutsResponse(_message.Message):
    __slots__ = ("layouts", "next_page_token")
    LAYOUTS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    layouts: _containers.RepeatedCompositeFieldContainer[StoredLayout]
    next_page_token: str
    def __init__(self, layouts: _Optional[_Iterable[_Union[StoredLayout, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class StoredLayout(_message.Message):
    __slots__ = ("fingerprint", "layout", "blocks", "size_bytes")
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    fingerprint: bytes
    layout: _types_pb2.Layout
    blocks: int
    size_bytes: int
    def __init__(self, fingerprint: _Optional[bytes] = ..., layout: _Optional[_Union[_types_pb2.Layout, _Mapping]] = ..., blocks: _Optional[int] = ..., size_bytes: _Optional[int] = ...) -> None: ...

class ListClientsRequest(_message.Message):
    __slots__ = ("page_size", "page_token")
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    page_size: int
    page_token: str
    def __init__(self, page_size: _Optional[int] = ..., page_token: _Optional[str] = ...) -> None: ...

class ListClientsResponse(_message.Message):
    __slots__ = ("clients", "next_page_token")
    CLIENTS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    clients: _containers.RepeatedCompositeFieldContainer[AttachedClient]
    next_page_token: str
    def __init__(self, clients: _Optional[_Iterable[_Union[AttachedClient, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class AttachedClient(_message.Message):
    __slots__ = ("name", "number", "attached_at", "leases", "leased_blocks", "sends_hints", "queued_requests")
    NAME_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    ATTACHED_AT_FIELD_NUMBER: _ClassVar[int]
    LEASES_FIELD_NUMBER: _ClassVar[int]
    LEASED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    SENDS_HINTS_FIELD_NUMBER: _ClassVar[int]
    QUEUED_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    name: str
    number: int
    attached_at: _timestamp_pb2.Timestamp
    leases: int
    leased_blocks: int
    sends_hints: bool
    queued_requests: int
    def __init__(self, name: _Optional[str] = ..., number: _Optional[int] = ..., attached_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., leases: _Optional[int] = ..., leased_blocks: _Optional[int] = ..., sends_hints: bool = ..., queued_requests: _Optional[int] = ...) -> None: ...

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
    __slots__ = ("tier", "tier_name", "bytes_per_second")
    TIER_FIELD_NUMBER: _ClassVar[int]
    TIER_NAME_FIELD_NUMBER: _ClassVar[int]
    BYTES_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    tier: _types_pb2.Tier
    tier_name: str
    bytes_per_second: int
    def __init__(self, tier: _Optional[_Union[_types_pb2.Tier, str]] = ..., tier_name: _Optional[str] = ..., bytes_per_second: _Optional[int] = ...) -> None: ...

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

class PinRequest(_message.Message):
    __slots__ = ("keys", "ttl_ms")
    KEYS_FIELD_NUMBER: _ClassVar[int]
    TTL_MS_FIELD_NUMBER: _ClassVar[int]
    keys: bytes
    ttl_ms: int
    def __init__(self, keys: _Optional[bytes] = ..., ttl_ms: _Optional[int] = ...) -> None: ...

class PinResponse(_message.Message):
    __slots__ = ("pinned", "missing", "pinned_until", "pinned_bytes", "pinned_bytes_max")
    PINNED_FIELD_NUMBER: _ClassVar[int]
    MISSING_FIELD_NUMBER: _ClassVar[int]
    PINNED_UNTIL_FIELD_NUMBER: _ClassVar[int]
    PINNED_BYTES_FIELD_NUMBER: _ClassVar[int]
    PINNED_BYTES_MAX_FIELD_NUMBER: _ClassVar[int]
    pinned: int
    missing: int
    pinned_until: _timestamp_pb2.Timestamp
    pinned_bytes: int
    pinned_bytes_max: int
    def __init__(self, pinned: _Optional[int] = ..., missing: _Optional[int] = ..., pinned_until: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., pinned_bytes: _Optional[int] = ..., pinned_bytes_max: _Optional[int] = ...) -> None: ...

class UnpinRequest(_message.Message):
    __slots__ = ("keys",)
    KEYS_FIELD_NUMBER: _ClassVar[int]
    keys: bytes
    def __init__(self, keys: _Optional[bytes] = ...) -> None: ...

class UnpinResponse(_message.Message):
    __slots__ = ("unpinned", "not_pinned", "missing")
    UNPINNED_FIELD_NUMBER: _ClassVar[int]
    NOT_PINNED_FIELD_NUMBER: _ClassVar[int]
    MISSING_FIELD_NUMBER: _ClassVar[int]
    unpinned: int
    not_pinned: int
    missing: int
    def __init__(self, unpinned: _Optional[int] = ..., not_pinned: _Optional[int] = ..., missing: _Optional[int] = ...) -> None: ...

class ExplainRequest(_message.Message):
    __slots__ = ("key", "request_id", "session_id", "key_prefix")
    KEY_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    KEY_PREFIX_FIELD_NUMBER: _ClassVar[int]
    key: bytes
    request_id: str
    session_id: str
    key_prefix: str
    def __init__(self, key: _Optional[bytes] = ..., request_id: _Optional[str] = ..., session_id: _Optional[str] = ..., key_prefix: _Optional[str] = ...) -> None: ...

class ExplainResponse(_message.Message):
    __slots__ = ("block", "request", "sessions")
    BLOCK_FIELD_NUMBER: _ClassVar[int]
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    SESSIONS_FIELD_NUMBER: _ClassVar[int]
    block: ExplainedBlock
    request: ExplainedRequest
    sessions: _containers.RepeatedCompositeFieldContainer[ExplainedSession]
    def __init__(self, block: _Optional[_Union[ExplainedBlock, _Mapping]] = ..., request: _Optional[_Union[ExplainedRequest, _Mapping]] = ..., sessions: _Optional[_Iterable[_Union[ExplainedSession, _Mapping]]] = ...) -> None: ...

class ExplainedSession(_message.Message):
    __slots__ = ("session", "layout", "usable_slices", "usable_tokens", "runs", "miss", "worth", "outside_dram_key", "left_dram")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    USABLE_SLICES_FIELD_NUMBER: _ClassVar[int]
    USABLE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    RUNS_FIELD_NUMBER: _ClassVar[int]
    MISS_FIELD_NUMBER: _ClassVar[int]
    WORTH_FIELD_NUMBER: _ClassVar[int]
    OUTSIDE_DRAM_KEY_FIELD_NUMBER: _ClassVar[int]
    LEFT_DRAM_FIELD_NUMBER: _ClassVar[int]
    session: _sessions_pb2.Session
    layout: _types_pb2.Layout
    usable_slices: int
    usable_tokens: int
    runs: _containers.RepeatedCompositeFieldContainer[_blocks_pb2.ResidencyRun]
    miss: Miss
    worth: PolicyWorth
    outside_dram_key: bytes
    left_dram: BlockEvent
    def __init__(self, session: _Optional[_Union[_sessions_pb2.Session, _Mapping]] = ..., layout: _Optional[_Union[_types_pb2.Layout, _Mapping]] = ..., usable_slices: _Optional[int] = ..., usable_tokens: _Optional[int] = ..., runs: _Optional[_Iterable[_Union[_blocks_pb2.ResidencyRun, _Mapping]]] = ..., miss: _Optional[_Union[Miss, _Mapping]] = ..., worth: _Optional[_Union[PolicyWorth, _Mapping]] = ..., outside_dram_key: _Optional[bytes] = ..., left_dram: _Optional[_Union[BlockEvent, _Mapping]] = ...) -> None: ...

class PolicyWorth(_message.Message):
    __slots__ = ("policy", "values")
    POLICY_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    policy: str
    values: _containers.RepeatedCompositeFieldContainer[TierWorth]
    def __init__(self, policy: _Optional[str] = ..., values: _Optional[_Iterable[_Union[TierWorth, _Mapping]]] = ...) -> None: ...

class TierWorth(_message.Message):
    __slots__ = ("tier_name", "score", "inputs")
    class InputsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    TIER_NAME_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    INPUTS_FIELD_NUMBER: _ClassVar[int]
    tier_name: str
    score: float
    inputs: _containers.ScalarMap[str, float]
    def __init__(self, tier_name: _Optional[str] = ..., score: _Optional[float] = ..., inputs: _Optional[_Mapping[str, float]] = ...) -> None: ...

class ExplainedBlock(_message.Message):
    __slots__ = ("key", "layout", "shards", "miss", "events", "remembers_since", "worth")
    KEY_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    SHARDS_FIELD_NUMBER: _ClassVar[int]
    MISS_FIELD_NUMBER: _ClassVar[int]
    EVENTS_FIELD_NUMBER: _ClassVar[int]
    REMEMBERS_SINCE_FIELD_NUMBER: _ClassVar[int]
    WORTH_FIELD_NUMBER: _ClassVar[int]
    key: bytes
    layout: _types_pb2.Layout
    shards: _containers.RepeatedCompositeFieldContainer[ExplainedShard]
    miss: Miss
    events: _containers.RepeatedCompositeFieldContainer[BlockEvent]
    remembers_since: _timestamp_pb2.Timestamp
    worth: PolicyWorth
    def __init__(self, key: _Optional[bytes] = ..., layout: _Optional[_Union[_types_pb2.Layout, _Mapping]] = ..., shards: _Optional[_Iterable[_Union[ExplainedShard, _Mapping]]] = ..., miss: _Optional[_Union[Miss, _Mapping]] = ..., events: _Optional[_Iterable[_Union[BlockEvent, _Mapping]]] = ..., remembers_since: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., worth: _Optional[_Union[PolicyWorth, _Mapping]] = ...) -> None: ...

class ExplainedShard(_message.Message):
    __slots__ = ("block", "places", "holds")
    BLOCK_FIELD_NUMBER: _ClassVar[int]
    PLACES_FIELD_NUMBER: _ClassVar[int]
    HOLDS_FIELD_NUMBER: _ClassVar[int]
    block: StoredBlock
    places: _containers.RepeatedCompositeFieldContainer[Place]
    holds: int
    def __init__(self, block: _Optional[_Union[StoredBlock, _Mapping]] = ..., places: _Optional[_Iterable[_Union[Place, _Mapping]]] = ..., holds: _Optional[int] = ...) -> None: ...

class Place(_message.Message):
    __slots__ = ("tier", "tier_name", "arrival", "since")
    TIER_FIELD_NUMBER: _ClassVar[int]
    TIER_NAME_FIELD_NUMBER: _ClassVar[int]
    ARRIVAL_FIELD_NUMBER: _ClassVar[int]
    SINCE_FIELD_NUMBER: _ClassVar[int]
    tier: _types_pb2.Tier
    tier_name: str
    arrival: Arrival
    since: _timestamp_pb2.Timestamp
    def __init__(self, tier: _Optional[_Union[_types_pb2.Tier, str]] = ..., tier_name: _Optional[str] = ..., arrival: _Optional[_Union[Arrival, str]] = ..., since: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ...) -> None: ...

class BlockEvent(_message.Message):
    __slots__ = ("kind", "at", "tier", "tier_name", "detail", "last_copy", "pin_ended_at", "space_for", "score")
    KIND_FIELD_NUMBER: _ClassVar[int]
    AT_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    TIER_NAME_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    LAST_COPY_FIELD_NUMBER: _ClassVar[int]
    PIN_ENDED_AT_FIELD_NUMBER: _ClassVar[int]
    SPACE_FOR_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    kind: EventKind
    at: _timestamp_pb2.Timestamp
    tier: _types_pb2.Tier
    tier_name: str
    detail: str
    last_copy: bool
    pin_ended_at: _timestamp_pb2.Timestamp
    space_for: SpaceFor
    score: float
    def __init__(self, kind: _Optional[_Union[EventKind, str]] = ..., at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., tier: _Optional[_Union[_types_pb2.Tier, str]] = ..., tier_name: _Optional[str] = ..., detail: _Optional[str] = ..., last_copy: bool = ..., pin_ended_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., space_for: _Optional[_Union[SpaceFor, str]] = ..., score: _Optional[float] = ...) -> None: ...

class Miss(_message.Message):
    __slots__ = ("key", "reason", "event", "remembers_since", "dram_emptied_at", "dram_emptied_because", "stored_since")
    KEY_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    EVENT_FIELD_NUMBER: _ClassVar[int]
    REMEMBERS_SINCE_FIELD_NUMBER: _ClassVar[int]
    DRAM_EMPTIED_AT_FIELD_NUMBER: _ClassVar[int]
    DRAM_EMPTIED_BECAUSE_FIELD_NUMBER: _ClassVar[int]
    STORED_SINCE_FIELD_NUMBER: _ClassVar[int]
    key: bytes
    reason: MissReason
    event: BlockEvent
    remembers_since: _timestamp_pb2.Timestamp
    dram_emptied_at: _timestamp_pb2.Timestamp
    dram_emptied_because: str
    stored_since: _timestamp_pb2.Timestamp
    def __init__(self, key: _Optional[bytes] = ..., reason: _Optional[_Union[MissReason, str]] = ..., event: _Optional[_Union[BlockEvent, _Mapping]] = ..., remembers_since: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., dram_emptied_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., dram_emptied_because: _Optional[str] = ..., stored_since: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ...) -> None: ...

class ExplainedRequest(_message.Message):
    __slots__ = ("request_id", "lookups", "lookups_more", "reports", "reports_more")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    LOOKUPS_FIELD_NUMBER: _ClassVar[int]
    LOOKUPS_MORE_FIELD_NUMBER: _ClassVar[int]
    REPORTS_FIELD_NUMBER: _ClassVar[int]
    REPORTS_MORE_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    lookups: _containers.RepeatedCompositeFieldContainer[ExplainedLookup]
    lookups_more: int
    reports: _containers.RepeatedCompositeFieldContainer[ExplainedReport]
    reports_more: int
    def __init__(self, request_id: _Optional[str] = ..., lookups: _Optional[_Iterable[_Union[ExplainedLookup, _Mapping]]] = ..., lookups_more: _Optional[int] = ..., reports: _Optional[_Iterable[_Union[ExplainedReport, _Mapping]]] = ..., reports_more: _Optional[int] = ...) -> None: ...

class ExplainedReport(_message.Message):
    __slots__ = ("at", "report")
    AT_FIELD_NUMBER: _ClassVar[int]
    REPORT_FIELD_NUMBER: _ClassVar[int]
    at: _timestamp_pb2.Timestamp
    report: _blocks_pb2.RequestReport
    def __init__(self, at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., report: _Optional[_Union[_blocks_pb2.RequestReport, _Mapping]] = ...) -> None: ...

class ExplainedLookup(_message.Message):
    __slots__ = ("at", "client_name", "layout_fingerprint", "layout", "shard", "asked_blocks", "hit_blocks", "hit_blocks_in_dram", "hit_blocks_on_ssd", "miss", "other_layouts", "loads", "loads_more")
    AT_FIELD_NUMBER: _ClassVar[int]
    CLIENT_NAME_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    SHARD_FIELD_NUMBER: _ClassVar[int]
    ASKED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    HIT_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    HIT_BLOCKS_IN_DRAM_FIELD_NUMBER: _ClassVar[int]
    HIT_BLOCKS_ON_SSD_FIELD_NUMBER: _ClassVar[int]
    MISS_FIELD_NUMBER: _ClassVar[int]
    OTHER_LAYOUTS_FIELD_NUMBER: _ClassVar[int]
    LOADS_FIELD_NUMBER: _ClassVar[int]
    LOADS_MORE_FIELD_NUMBER: _ClassVar[int]
    at: _timestamp_pb2.Timestamp
    client_name: str
    layout_fingerprint: bytes
    layout: _types_pb2.Layout
    shard: _types_pb2.Shard
    asked_blocks: int
    hit_blocks: int
    hit_blocks_in_dram: int
    hit_blocks_on_ssd: int
    miss: Miss
    other_layouts: _containers.RepeatedCompositeFieldContainer[OtherLayout]
    loads: _containers.RepeatedCompositeFieldContainer[ExplainedLoad]
    loads_more: int
    def __init__(self, at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., client_name: _Optional[str] = ..., layout_fingerprint: _Optional[bytes] = ..., layout: _Optional[_Union[_types_pb2.Layout, _Mapping]] = ..., shard: _Optional[_Union[_types_pb2.Shard, _Mapping]] = ..., asked_blocks: _Optional[int] = ..., hit_blocks: _Optional[int] = ..., hit_blocks_in_dram: _Optional[int] = ..., hit_blocks_on_ssd: _Optional[int] = ..., miss: _Optional[_Union[Miss, _Mapping]] = ..., other_layouts: _Optional[_Iterable[_Union[OtherLayout, _Mapping]]] = ..., loads: _Optional[_Iterable[_Union[ExplainedLoad, _Mapping]]] = ..., loads_more: _Optional[int] = ...) -> None: ...

class OtherLayout(_message.Message):
    __slots__ = ("layout_fingerprint", "differences")
    LAYOUT_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    DIFFERENCES_FIELD_NUMBER: _ClassVar[int]
    layout_fingerprint: bytes
    differences: _containers.RepeatedCompositeFieldContainer[LayoutDifference]
    def __init__(self, layout_fingerprint: _Optional[bytes] = ..., differences: _Optional[_Iterable[_Union[LayoutDifference, _Mapping]]] = ...) -> None: ...

class LayoutDifference(_message.Message):
    __slots__ = ("field", "stored", "asked")
    FIELD_FIELD_NUMBER: _ClassVar[int]
    STORED_FIELD_NUMBER: _ClassVar[int]
    ASKED_FIELD_NUMBER: _ClassVar[int]
    field: str
    stored: str
    asked: str
    def __init__(self, field: _Optional[str] = ..., stored: _Optional[str] = ..., asked: _Optional[str] = ...) -> None: ...

class ExplainedLoad(_message.Message):
    __slots__ = ("began_at", "blocks", "layers", "blocks_from_dram", "blocks_from_ssd", "sent_bytes", "took_ms", "outcome", "in_place", "path")
    BEGAN_AT_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FROM_DRAM_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FROM_SSD_FIELD_NUMBER: _ClassVar[int]
    SENT_BYTES_FIELD_NUMBER: _ClassVar[int]
    TOOK_MS_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    IN_PLACE_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    began_at: _timestamp_pb2.Timestamp
    blocks: int
    layers: int
    blocks_from_dram: int
    blocks_from_ssd: int
    sent_bytes: int
    took_ms: float
    outcome: str
    in_place: bool
    path: str
    def __init__(self, began_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., blocks: _Optional[int] = ..., layers: _Optional[int] = ..., blocks_from_dram: _Optional[int] = ..., blocks_from_ssd: _Optional[int] = ..., sent_bytes: _Optional[int] = ..., took_ms: _Optional[float] = ..., outcome: _Optional[str] = ..., in_place: bool = ..., path: _Optional[str] = ...) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ("action",)
    ACTION_FIELD_NUMBER: _ClassVar[int]
    action: DrainAction
    def __init__(self, action: _Optional[_Union[DrainAction, str]] = ...) -> None: ...

class DrainResponse(_message.Message):
    __slots__ = ("uploads", "loads", "blocks_only_in_dram", "bytes_only_in_dram", "unwritten", "waiting_because", "done")
    UPLOADS_FIELD_NUMBER: _ClassVar[int]
    LOADS_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_ONLY_IN_DRAM_FIELD_NUMBER: _ClassVar[int]
    BYTES_ONLY_IN_DRAM_FIELD_NUMBER: _ClassVar[int]
    UNWRITTEN_FIELD_NUMBER: _ClassVar[int]
    WAITING_BECAUSE_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    uploads: int
    loads: int
    blocks_only_in_dram: int
    bytes_only_in_dram: int
    unwritten: int
    waiting_because: str
    done: bool
    def __init__(self, uploads: _Optional[int] = ..., loads: _Optional[int] = ..., blocks_only_in_dram: _Optional[int] = ..., bytes_only_in_dram: _Optional[int] = ..., unwritten: _Optional[int] = ..., waiting_because: _Optional[str] = ..., done: bool = ...) -> None: ...

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

class RecordTraceRequest(_message.Message):
    __slots__ = ("layout_fingerprint", "duration_ms")
    LAYOUT_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    DURATION_MS_FIELD_NUMBER: _ClassVar[int]
    layout_fingerprint: bytes
    duration_ms: int
    def __init__(self, layout_fingerprint: _Optional[bytes] = ..., duration_ms: _Optional[int] = ...) -> None: ...

class RecordTraceResponse(_message.Message):
    __slots__ = ("layout", "turns", "dropped", "done")
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    TURNS_FIELD_NUMBER: _ClassVar[int]
    DROPPED_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    layout: RecordedLayout
    turns: _containers.RepeatedCompositeFieldContainer[RecordedTurn]
    dropped: int
    done: bool
    def __init__(self, layout: _Optional[_Union[RecordedLayout, _Mapping]] = ..., turns: _Optional[_Iterable[_Union[RecordedTurn, _Mapping]]] = ..., dropped: _Optional[int] = ..., done: bool = ...) -> None: ...

class RecordedLayout(_message.Message):
    __slots__ = ("layout_fingerprint", "block_tokens", "kv_bytes_per_token")
    LAYOUT_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    BLOCK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    KV_BYTES_PER_TOKEN_FIELD_NUMBER: _ClassVar[int]
    layout_fingerprint: bytes
    block_tokens: int
    kv_bytes_per_token: int
    def __init__(self, layout_fingerprint: _Optional[bytes] = ..., block_tokens: _Optional[int] = ..., kv_bytes_per_token: _Optional[int] = ...) -> None: ...

class RecordedTurn(_message.Message):
    __slots__ = ("arrived_s", "prompt_tokens", "answer_tokens", "hash_ids")
    ARRIVED_S_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ANSWER_TOKENS_FIELD_NUMBER: _ClassVar[int]
    HASH_IDS_FIELD_NUMBER: _ClassVar[int]
    arrived_s: float
    prompt_tokens: int
    answer_tokens: int
    hash_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, arrived_s: _Optional[float] = ..., prompt_tokens: _Optional[int] = ..., answer_tokens: _Optional[int] = ..., hash_ids: _Optional[_Iterable[int]] = ...) -> None: ...
