from google.rpc import status_pb2 as _status_pb2
from kvservice_api.v1 import types_pb2 as _types_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class RequestPlan(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    REQUEST_PLAN_UNSPECIFIED: _ClassVar[RequestPlan]
    REQUEST_PLAN_LOAD: _ClassVar[RequestPlan]
    REQUEST_PLAN_RECOMPUTE: _ClassVar[RequestPlan]
    REQUEST_PLAN_MIXED: _ClassVar[RequestPlan]

class RequestOutcome(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    REQUEST_OUTCOME_UNSPECIFIED: _ClassVar[RequestOutcome]
    REQUEST_OUTCOME_DONE: _ClassVar[RequestOutcome]
    REQUEST_OUTCOME_MISS: _ClassVar[RequestOutcome]
    REQUEST_OUTCOME_FAILED_OVER: _ClassVar[RequestOutcome]
    REQUEST_OUTCOME_BREAKER_OPEN: _ClassVar[RequestOutcome]
REQUEST_PLAN_UNSPECIFIED: RequestPlan
REQUEST_PLAN_LOAD: RequestPlan
REQUEST_PLAN_RECOMPUTE: RequestPlan
REQUEST_PLAN_MIXED: RequestPlan
REQUEST_OUTCOME_UNSPECIFIED: RequestOutcome
REQUEST_OUTCOME_DONE: RequestOutcome
REQUEST_OUTCOME_MISS: RequestOutcome
REQUEST_OUTCOME_FAILED_OVER: RequestOutcome
REQUEST_OUTCOME_BREAKER_OPEN: RequestOutcome

class GetCapabilitiesRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetCapabilitiesResponse(_message.Message):
    __slots__ = ("version", "boot_epoch", "store_id", "max_frame_bytes", "max_keys", "max_lease_ttl_ms", "transports", "max_save_blocks", "max_save_slices", "max_tails", "keeps_generations", "takes_hints", "restores_sessions", "max_save_chains", "arena_directory", "arena_id", "arena_capacity_bytes", "arena_writable", "arena_not_shared_because", "residency_directory", "cuda_ipc_refused_because", "bulk_port", "max_session_slices", "session_ttl_ms")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    BOOT_EPOCH_FIELD_NUMBER: _ClassVar[int]
    STORE_ID_FIELD_NUMBER: _ClassVar[int]
    MAX_FRAME_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_KEYS_FIELD_NUMBER: _ClassVar[int]
    MAX_LEASE_TTL_MS_FIELD_NUMBER: _ClassVar[int]
    TRANSPORTS_FIELD_NUMBER: _ClassVar[int]
    MAX_SAVE_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    MAX_SAVE_SLICES_FIELD_NUMBER: _ClassVar[int]
    MAX_TAILS_FIELD_NUMBER: _ClassVar[int]
    KEEPS_GENERATIONS_FIELD_NUMBER: _ClassVar[int]
    TAKES_HINTS_FIELD_NUMBER: _ClassVar[int]
    RESTORES_SESSIONS_FIELD_NUMBER: _ClassVar[int]
    MAX_SAVE_CHAINS_FIELD_NUMBER: _ClassVar[int]
    ARENA_DIRECTORY_FIELD_NUMBER: _ClassVar[int]
    ARENA_ID_FIELD_NUMBER: _ClassVar[int]
    ARENA_CAPACITY_BYTES_FIELD_NUMBER: _ClassVar[int]
    ARENA_WRITABLE_FIELD_NUMBER: _ClassVar[int]
    ARENA_NOT_SHARED_BECAUSE_FIELD_NUMBER: _ClassVar[int]
    RESIDENCY_DIRECTORY_FIELD_NUMBER: _ClassVar[int]
    CUDA_IPC_REFUSED_BECAUSE_FIELD_NUMBER: _ClassVar[int]
    BULK_PORT_FIELD_NUMBER: _ClassVar[int]
    MAX_SESSION_SLICES_FIELD_NUMBER: _ClassVar[int]
    SESSION_TTL_MS_FIELD_NUMBER: _ClassVar[int]
    version: str
    boot_epoch: int
    store_id: bytes
    max_frame_bytes: int
    max_keys: int
    max_lease_ttl_ms: int
    transports: _containers.RepeatedScalarFieldContainer[str]
    max_save_blocks: int
    max_save_slices: int
    max_tails: int
    keeps_generations: bool
    takes_hints: bool
    restores_sessions: bool
    max_save_chains: int
    arena_directory: str
    arena_id: bytes
    arena_capacity_bytes: int
    arena_writable: bool
    arena_not_shared_because: str
    residency_directory: str
    cuda_ipc_refused_because: str
    bulk_port: int
    max_session_slices: int
    session_ttl_ms: int
    def __init__(self, version: _Optional[str] = ..., boot_epoch: _Optional[int] = ..., store_id: _Optional[bytes] = ..., max_frame_bytes: _Optional[int] = ..., max_keys: _Optional[int] = ..., max_lease_ttl_ms: _Optional[int] = ..., transports: _Optional[_Iterable[str]] = ..., max_save_blocks: _Optional[int] = ..., max_save_slices: _Optional[int] = ..., max_tails: _Optional[int] = ..., keeps_generations: bool = ..., takes_hints: bool = ..., restores_sessions: bool = ..., max_save_chains: _Optional[int] = ..., arena_directory: _Optional[str] = ..., arena_id: _Optional[bytes] = ..., arena_capacity_bytes: _Optional[int] = ..., arena_writable: bool = ..., arena_not_shared_because: _Optional[str] = ..., residency_directory: _Optional[str] = ..., cuda_ipc_refused_because: _Optional[str] = ..., bulk_port: _Optional[int] = ..., max_session_slices: _Optional[int] = ..., session_ttl_ms: _Optional[int] = ...) -> None: ...

class OpenLayoutRequest(_message.Message):
    __slots__ = ("layout", "fingerprint")
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    layout: _types_pb2.Layout
    fingerprint: bytes
    def __init__(self, layout: _Optional[_Union[_types_pb2.Layout, _Mapping]] = ..., fingerprint: _Optional[bytes] = ...) -> None: ...

class OpenLayoutResponse(_message.Message):
    __slots__ = ("created",)
    CREATED_FIELD_NUMBER: _ClassVar[int]
    created: bool
    def __init__(self, created: bool = ...) -> None: ...

class AttachRequest(_message.Message):
    __slots__ = ("client_name",)
    CLIENT_NAME_FIELD_NUMBER: _ClassVar[int]
    client_name: str
    def __init__(self, client_name: _Optional[str] = ...) -> None: ...

class AttachResponse(_message.Message):
    __slots__ = ("client_id", "boot_epoch")
    CLIENT_ID_FIELD_NUMBER: _ClassVar[int]
    BOOT_EPOCH_FIELD_NUMBER: _ClassVar[int]
    client_id: bytes
    boot_epoch: int
    def __init__(self, client_id: _Optional[bytes] = ..., boot_epoch: _Optional[int] = ...) -> None: ...

class LookupPrefixRequest(_message.Message):
    __slots__ = ("client_id", "layout_fingerprint", "shard", "keys", "lease_ttl_ms", "parent_key", "request_id", "locate", "offer_load")
    CLIENT_ID_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    SHARD_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    LEASE_TTL_MS_FIELD_NUMBER: _ClassVar[int]
    PARENT_KEY_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    LOCATE_FIELD_NUMBER: _ClassVar[int]
    OFFER_LOAD_FIELD_NUMBER: _ClassVar[int]
    client_id: bytes
    layout_fingerprint: bytes
    shard: _types_pb2.Shard
    keys: bytes
    lease_ttl_ms: int
    parent_key: bytes
    request_id: str
    locate: bool
    offer_load: int
    def __init__(self, client_id: _Optional[bytes] = ..., layout_fingerprint: _Optional[bytes] = ..., shard: _Optional[_Union[_types_pb2.Shard, _Mapping]] = ..., keys: _Optional[bytes] = ..., lease_ttl_ms: _Optional[int] = ..., parent_key: _Optional[bytes] = ..., request_id: _Optional[str] = ..., locate: bool = ..., offer_load: _Optional[int] = ...) -> None: ...

class LookupPrefixResponse(_message.Message):
    __slots__ = ("hit_blocks", "lease_id", "lease_ttl_ms", "runs", "tails", "located", "located_verified", "offered_load")
    HIT_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    LEASE_TTL_MS_FIELD_NUMBER: _ClassVar[int]
    RUNS_FIELD_NUMBER: _ClassVar[int]
    TAILS_FIELD_NUMBER: _ClassVar[int]
    LOCATED_FIELD_NUMBER: _ClassVar[int]
    LOCATED_VERIFIED_FIELD_NUMBER: _ClassVar[int]
    OFFERED_LOAD_FIELD_NUMBER: _ClassVar[int]
    hit_blocks: int
    lease_id: int
    lease_ttl_ms: int
    runs: _containers.RepeatedCompositeFieldContainer[ResidencyRun]
    tails: _containers.RepeatedCompositeFieldContainer[Tail]
    located: LocateBlocksResponse
    located_verified: bool
    offered_load: OpenTransferResponse
    def __init__(self, hit_blocks: _Optional[int] = ..., lease_id: _Optional[int] = ..., lease_ttl_ms: _Optional[int] = ..., runs: _Optional[_Iterable[_Union[ResidencyRun, _Mapping]]] = ..., tails: _Optional[_Iterable[_Union[Tail, _Mapping]]] = ..., located: _Optional[_Union[LocateBlocksResponse, _Mapping]] = ..., located_verified: bool = ..., offered_load: _Optional[_Union[OpenTransferResponse, _Mapping]] = ...) -> None: ...

class Tail(_message.Message):
    __slots__ = ("key", "token_count")
    KEY_FIELD_NUMBER: _ClassVar[int]
    TOKEN_COUNT_FIELD_NUMBER: _ClassVar[int]
    key: bytes
    token_count: int
    def __init__(self, key: _Optional[bytes] = ..., token_count: _Optional[int] = ...) -> None: ...

class ResidencyRun(_message.Message):
    __slots__ = ("count", "dram", "ssd")
    COUNT_FIELD_NUMBER: _ClassVar[int]
    DRAM_FIELD_NUMBER: _ClassVar[int]
    SSD_FIELD_NUMBER: _ClassVar[int]
    count: int
    dram: bool
    ssd: bool
    def __init__(self, count: _Optional[int] = ..., dram: bool = ..., ssd: bool = ...) -> None: ...

class ExportLeaseRequest(_message.Message):
    __slots__ = ("client_id", "lease_id", "ttl_ms", "adoptions")
    CLIENT_ID_FIELD_NUMBER: _ClassVar[int]
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    TTL_MS_FIELD_NUMBER: _ClassVar[int]
    ADOPTIONS_FIELD_NUMBER: _ClassVar[int]
    client_id: bytes
    lease_id: int
    ttl_ms: int
    adoptions: int
    def __init__(self, client_id: _Optional[bytes] = ..., lease_id: _Optional[int] = ..., ttl_ms: _Optional[int] = ..., adoptions: _Optional[int] = ...) -> None: ...

class ExportLeaseResponse(_message.Message):
    __slots__ = ("ticket", "ttl_ms")
    TICKET_FIELD_NUMBER: _ClassVar[int]
    TTL_MS_FIELD_NUMBER: _ClassVar[int]
    ticket: bytes
    ttl_ms: int
    def __init__(self, ticket: _Optional[bytes] = ..., ttl_ms: _Optional[int] = ...) -> None: ...

class AdoptLeaseRequest(_message.Message):
    __slots__ = ("client_id", "ticket", "layout_fingerprint", "shard", "lease_ttl_ms", "locate", "offer_load")
    CLIENT_ID_FIELD_NUMBER: _ClassVar[int]
    TICKET_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    SHARD_FIELD_NUMBER: _ClassVar[int]
    LEASE_TTL_MS_FIELD_NUMBER: _ClassVar[int]
    LOCATE_FIELD_NUMBER: _ClassVar[int]
    OFFER_LOAD_FIELD_NUMBER: _ClassVar[int]
    client_id: bytes
    ticket: bytes
    layout_fingerprint: bytes
    shard: _types_pb2.Shard
    lease_ttl_ms: int
    locate: bool
    offer_load: int
    def __init__(self, client_id: _Optional[bytes] = ..., ticket: _Optional[bytes] = ..., layout_fingerprint: _Optional[bytes] = ..., shard: _Optional[_Union[_types_pb2.Shard, _Mapping]] = ..., lease_ttl_ms: _Optional[int] = ..., locate: bool = ..., offer_load: _Optional[int] = ...) -> None: ...

class AdoptLeaseResponse(_message.Message):
    __slots__ = ("lease_id", "lease_ttl_ms", "token_counts", "runs", "located", "located_verified", "offered_load")
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    LEASE_TTL_MS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_COUNTS_FIELD_NUMBER: _ClassVar[int]
    RUNS_FIELD_NUMBER: _ClassVar[int]
    LOCATED_FIELD_NUMBER: _ClassVar[int]
    LOCATED_VERIFIED_FIELD_NUMBER: _ClassVar[int]
    OFFERED_LOAD_FIELD_NUMBER: _ClassVar[int]
    lease_id: int
    lease_ttl_ms: int
    token_counts: _containers.RepeatedScalarFieldContainer[int]
    runs: _containers.RepeatedCompositeFieldContainer[ResidencyRun]
    located: LocateBlocksResponse
    located_verified: bool
    offered_load: OpenTransferResponse
    def __init__(self, lease_id: _Optional[int] = ..., lease_ttl_ms: _Optional[int] = ..., token_counts: _Optional[_Iterable[int]] = ..., runs: _Optional[_Iterable[_Union[ResidencyRun, _Mapping]]] = ..., located: _Optional[_Union[LocateBlocksResponse, _Mapping]] = ..., located_verified: bool = ..., offered_load: _Optional[_Union[OpenTransferResponse, _Mapping]] = ...) -> None: ...

class LoadBlocksRequest(_message.Message):
    __slots__ = ("client_id", "lease_id", "first_block", "block_count", "first_layer", "layer_count", "shard")
    CLIENT_ID_FIELD_NUMBER: _ClassVar[int]
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    FIRST_BLOCK_FIELD_NUMBER: _ClassVar[int]
    BLOCK_COUNT_FIELD_NUMBER: _ClassVar[int]
    FIRST_LAYER_FIELD_NUMBER: _ClassVar[int]
    LAYER_COUNT_FIELD_NUMBER: _ClassVar[int]
    SHARD_FIELD_NUMBER: _ClassVar[int]
    client_id: bytes
    lease_id: int
    first_block: int
    block_count: int
    first_layer: int
    layer_count: int
    shard: _types_pb2.Shard
    def __init__(self, client_id: _Optional[bytes] = ..., lease_id: _Optional[int] = ..., first_block: _Optional[int] = ..., block_count: _Optional[int] = ..., first_layer: _Optional[int] = ..., layer_count: _Optional[int] = ..., shard: _Optional[_Union[_types_pb2.Shard, _Mapping]] = ...) -> None: ...

class LoadBlocksResponse(_message.Message):
    __slots__ = ("layer", "first_block", "first_offset_bytes", "payload")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    FIRST_BLOCK_FIELD_NUMBER: _ClassVar[int]
    FIRST_OFFSET_BYTES_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    layer: int
    first_block: int
    first_offset_bytes: int
    payload: bytes
    def __init__(self, layer: _Optional[int] = ..., first_block: _Optional[int] = ..., first_offset_bytes: _Optional[int] = ..., payload: _Optional[bytes] = ...) -> None: ...

class SaveBlocksRequest(_message.Message):
    __slots__ = ("layer", "first_block", "first_offset_bytes", "header", "commit", "payload")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    FIRST_BLOCK_FIELD_NUMBER: _ClassVar[int]
    FIRST_OFFSET_BYTES_FIELD_NUMBER: _ClassVar[int]
    HEADER_FIELD_NUMBER: _ClassVar[int]
    COMMIT_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    layer: int
    first_block: int
    first_offset_bytes: int
    header: SaveHeader
    commit: SaveCommit
    payload: bytes
    def __init__(self, layer: _Optional[int] = ..., first_block: _Optional[int] = ..., first_offset_bytes: _Optional[int] = ..., header: _Optional[_Union[SaveHeader, _Mapping]] = ..., commit: _Optional[_Union[SaveCommit, _Mapping]] = ..., payload: _Optional[bytes] = ...) -> None: ...

class SaveHeader(_message.Message):
    __slots__ = ("client_id", "layout_fingerprint", "shard", "parent_key", "keys", "last_block_tokens", "durability", "more")
    CLIENT_ID_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    SHARD_FIELD_NUMBER: _ClassVar[int]
    PARENT_KEY_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    LAST_BLOCK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    DURABILITY_FIELD_NUMBER: _ClassVar[int]
    MORE_FIELD_NUMBER: _ClassVar[int]
    client_id: bytes
    layout_fingerprint: bytes
    shard: _types_pb2.Shard
    parent_key: bytes
    keys: bytes
    last_block_tokens: int
    durability: _types_pb2.Durability
    more: _containers.RepeatedCompositeFieldContainer[SaveChain]
    def __init__(self, client_id: _Optional[bytes] = ..., layout_fingerprint: _Optional[bytes] = ..., shard: _Optional[_Union[_types_pb2.Shard, _Mapping]] = ..., parent_key: _Optional[bytes] = ..., keys: _Optional[bytes] = ..., last_block_tokens: _Optional[int] = ..., durability: _Optional[_Union[_types_pb2.Durability, str]] = ..., more: _Optional[_Iterable[_Union[SaveChain, _Mapping]]] = ...) -> None: ...

class SaveChain(_message.Message):
    __slots__ = ("parent_key", "keys", "last_block_tokens")
    PARENT_KEY_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    LAST_BLOCK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    parent_key: bytes
    keys: bytes
    last_block_tokens: int
    def __init__(self, parent_key: _Optional[bytes] = ..., keys: _Optional[bytes] = ..., last_block_tokens: _Optional[int] = ...) -> None: ...

class SaveCommit(_message.Message):
    __slots__ = ("checksums",)
    CHECKSUMS_FIELD_NUMBER: _ClassVar[int]
    checksums: bytes
    def __init__(self, checksums: _Optional[bytes] = ...) -> None: ...

class SaveBlocksResponse(_message.Message):
    __slots__ = ("stored", "already_stored", "refused", "stored_blocks")
    STORED_FIELD_NUMBER: _ClassVar[int]
    ALREADY_STORED_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    STORED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    stored: int
    already_stored: int
    refused: _containers.RepeatedCompositeFieldContainer[RefusedBlock]
    stored_blocks: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, stored: _Optional[int] = ..., already_stored: _Optional[int] = ..., refused: _Optional[_Iterable[_Union[RefusedBlock, _Mapping]]] = ..., stored_blocks: _Optional[_Iterable[int]] = ...) -> None: ...

class RefusedBlock(_message.Message):
    __slots__ = ("block", "status")
    BLOCK_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    block: int
    status: _status_pb2.Status
    def __init__(self, block: _Optional[int] = ..., status: _Optional[_Union[_status_pb2.Status, _Mapping]] = ...) -> None: ...

class OpenTransferRequest(_message.Message):
    __slots__ = ("load", "save", "calls", "connections")
    LOAD_FIELD_NUMBER: _ClassVar[int]
    SAVE_FIELD_NUMBER: _ClassVar[int]
    CALLS_FIELD_NUMBER: _ClassVar[int]
    CONNECTIONS_FIELD_NUMBER: _ClassVar[int]
    load: LoadBlocksRequest
    save: SaveHeader
    calls: CallsHeader
    connections: int
    def __init__(self, load: _Optional[_Union[LoadBlocksRequest, _Mapping]] = ..., save: _Optional[_Union[SaveHeader, _Mapping]] = ..., calls: _Optional[_Union[CallsHeader, _Mapping]] = ..., connections: _Optional[int] = ...) -> None: ...

class CallsHeader(_message.Message):
    __slots__ = ("client_id",)
    CLIENT_ID_FIELD_NUMBER: _ClassVar[int]
    client_id: bytes
    def __init__(self, client_id: _Optional[bytes] = ...) -> None: ...

class OpenTransferResponse(_message.Message):
    __slots__ = ("tickets", "ttl_ms", "blocks", "refused")
    TICKETS_FIELD_NUMBER: _ClassVar[int]
    TTL_MS_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    tickets: _containers.RepeatedScalarFieldContainer[bytes]
    ttl_ms: int
    blocks: _containers.RepeatedScalarFieldContainer[int]
    refused: _containers.RepeatedCompositeFieldContainer[RefusedBlock]
    def __init__(self, tickets: _Optional[_Iterable[bytes]] = ..., ttl_ms: _Optional[int] = ..., blocks: _Optional[_Iterable[int]] = ..., refused: _Optional[_Iterable[_Union[RefusedBlock, _Mapping]]] = ...) -> None: ...

class LocateBlocksRequest(_message.Message):
    __slots__ = ("client_id", "lease_id", "first_block", "block_count", "verify", "shard")
    CLIENT_ID_FIELD_NUMBER: _ClassVar[int]
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    FIRST_BLOCK_FIELD_NUMBER: _ClassVar[int]
    BLOCK_COUNT_FIELD_NUMBER: _ClassVar[int]
    VERIFY_FIELD_NUMBER: _ClassVar[int]
    SHARD_FIELD_NUMBER: _ClassVar[int]
    client_id: bytes
    lease_id: int
    first_block: int
    block_count: int
    verify: bool
    shard: _types_pb2.Shard
    def __init__(self, client_id: _Optional[bytes] = ..., lease_id: _Optional[int] = ..., first_block: _Optional[int] = ..., block_count: _Optional[int] = ..., verify: bool = ..., shard: _Optional[_Union[_types_pb2.Shard, _Mapping]] = ...) -> None: ...

class LocateBlocksResponse(_message.Message):
    __slots__ = ("arena_id", "not_in_place_because", "offsets", "generations", "trailer_checksums", "token_counts", "shards", "layers_ready")
    ARENA_ID_FIELD_NUMBER: _ClassVar[int]
    NOT_IN_PLACE_BECAUSE_FIELD_NUMBER: _ClassVar[int]
    OFFSETS_FIELD_NUMBER: _ClassVar[int]
    GENERATIONS_FIELD_NUMBER: _ClassVar[int]
    TRAILER_CHECKSUMS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_COUNTS_FIELD_NUMBER: _ClassVar[int]
    SHARDS_FIELD_NUMBER: _ClassVar[int]
    LAYERS_READY_FIELD_NUMBER: _ClassVar[int]
    arena_id: bytes
    not_in_place_because: str
    offsets: _containers.RepeatedScalarFieldContainer[int]
    generations: _containers.RepeatedScalarFieldContainer[int]
    trailer_checksums: _containers.RepeatedScalarFieldContainer[int]
    token_counts: _containers.RepeatedScalarFieldContainer[int]
    shards: bytes
    layers_ready: int
    def __init__(self, arena_id: _Optional[bytes] = ..., not_in_place_because: _Optional[str] = ..., offsets: _Optional[_Iterable[int]] = ..., generations: _Optional[_Iterable[int]] = ..., trailer_checksums: _Optional[_Iterable[int]] = ..., token_counts: _Optional[_Iterable[int]] = ..., shards: _Optional[bytes] = ..., layers_ready: _Optional[int] = ...) -> None: ...

class ReserveBlocksRequest(_message.Message):
    __slots__ = ("header", "reservation_id")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    RESERVATION_ID_FIELD_NUMBER: _ClassVar[int]
    header: SaveHeader
    reservation_id: int
    def __init__(self, header: _Optional[_Union[SaveHeader, _Mapping]] = ..., reservation_id: _Optional[int] = ...) -> None: ...

class ReserveBlocksResponse(_message.Message):
    __slots__ = ("arena_id", "blocks", "offsets", "refused")
    ARENA_ID_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    OFFSETS_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    arena_id: bytes
    blocks: _containers.RepeatedScalarFieldContainer[int]
    offsets: _containers.RepeatedScalarFieldContainer[int]
    refused: _containers.RepeatedCompositeFieldContainer[RefusedBlock]
    def __init__(self, arena_id: _Optional[bytes] = ..., blocks: _Optional[_Iterable[int]] = ..., offsets: _Optional[_Iterable[int]] = ..., refused: _Optional[_Iterable[_Union[RefusedBlock, _Mapping]]] = ...) -> None: ...

class CommitBlocksRequest(_message.Message):
    __slots__ = ("client_id", "reservation_id", "checksums")
    CLIENT_ID_FIELD_NUMBER: _ClassVar[int]
    RESERVATION_ID_FIELD_NUMBER: _ClassVar[int]
    CHECKSUMS_FIELD_NUMBER: _ClassVar[int]
    client_id: bytes
    reservation_id: int
    checksums: bytes
    def __init__(self, client_id: _Optional[bytes] = ..., reservation_id: _Optional[int] = ..., checksums: _Optional[bytes] = ...) -> None: ...

class AbandonBlocksRequest(_message.Message):
    __slots__ = ("client_id", "reservation_id")
    CLIENT_ID_FIELD_NUMBER: _ClassVar[int]
    RESERVATION_ID_FIELD_NUMBER: _ClassVar[int]
    client_id: bytes
    reservation_id: int
    def __init__(self, client_id: _Optional[bytes] = ..., reservation_id: _Optional[int] = ...) -> None: ...

class AbandonBlocksResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class RenewLeaseRequest(_message.Message):
    __slots__ = ("client_id", "lease_id", "ttl_ms")
    CLIENT_ID_FIELD_NUMBER: _ClassVar[int]
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    TTL_MS_FIELD_NUMBER: _ClassVar[int]
    client_id: bytes
    lease_id: int
    ttl_ms: int
    def __init__(self, client_id: _Optional[bytes] = ..., lease_id: _Optional[int] = ..., ttl_ms: _Optional[int] = ...) -> None: ...

class RenewLeaseResponse(_message.Message):
    __slots__ = ("ttl_ms",)
    TTL_MS_FIELD_NUMBER: _ClassVar[int]
    ttl_ms: int
    def __init__(self, ttl_ms: _Optional[int] = ...) -> None: ...

class ReleaseLeaseRequest(_message.Message):
    __slots__ = ("client_id", "lease_id", "loads")
    CLIENT_ID_FIELD_NUMBER: _ClassVar[int]
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    LOADS_FIELD_NUMBER: _ClassVar[int]
    client_id: bytes
    lease_id: int
    loads: _containers.RepeatedCompositeFieldContainer[InPlaceLoad]
    def __init__(self, client_id: _Optional[bytes] = ..., lease_id: _Optional[int] = ..., loads: _Optional[_Iterable[_Union[InPlaceLoad, _Mapping]]] = ...) -> None: ...

class InPlaceLoad(_message.Message):
    __slots__ = ("first_block", "block_count", "took_us")
    FIRST_BLOCK_FIELD_NUMBER: _ClassVar[int]
    BLOCK_COUNT_FIELD_NUMBER: _ClassVar[int]
    TOOK_US_FIELD_NUMBER: _ClassVar[int]
    first_block: int
    block_count: int
    took_us: int
    def __init__(self, first_block: _Optional[int] = ..., block_count: _Optional[int] = ..., took_us: _Optional[int] = ...) -> None: ...

class ReleaseLeaseResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class PrefetchRequest(_message.Message):
    __slots__ = ("keys", "deadline_ms", "wait", "sessions")
    KEYS_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_MS_FIELD_NUMBER: _ClassVar[int]
    WAIT_FIELD_NUMBER: _ClassVar[int]
    SESSIONS_FIELD_NUMBER: _ClassVar[int]
    keys: bytes
    deadline_ms: int
    wait: bool
    sessions: _containers.RepeatedCompositeFieldContainer[_types_pb2.SessionName]
    def __init__(self, keys: _Optional[bytes] = ..., deadline_ms: _Optional[int] = ..., wait: bool = ..., sessions: _Optional[_Iterable[_Union[_types_pb2.SessionName, _Mapping]]] = ...) -> None: ...

class PrefetchResponse(_message.Message):
    __slots__ = ("missing", "in_dram", "promoted", "failed", "missing_sessions")
    MISSING_FIELD_NUMBER: _ClassVar[int]
    IN_DRAM_FIELD_NUMBER: _ClassVar[int]
    PROMOTED_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    MISSING_SESSIONS_FIELD_NUMBER: _ClassVar[int]
    missing: int
    in_dram: int
    promoted: int
    failed: int
    missing_sessions: int
    def __init__(self, missing: _Optional[int] = ..., in_dram: _Optional[int] = ..., promoted: _Optional[int] = ..., failed: _Optional[int] = ..., missing_sessions: _Optional[int] = ...) -> None: ...

class EvictRequest(_message.Message):
    __slots__ = ("keys", "tier", "tier_name", "sessions")
    KEYS_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    TIER_NAME_FIELD_NUMBER: _ClassVar[int]
    SESSIONS_FIELD_NUMBER: _ClassVar[int]
    keys: bytes
    tier: _types_pb2.Tier
    tier_name: str
    sessions: _containers.RepeatedCompositeFieldContainer[_types_pb2.SessionName]
    def __init__(self, keys: _Optional[bytes] = ..., tier: _Optional[_Union[_types_pb2.Tier, str]] = ..., tier_name: _Optional[str] = ..., sessions: _Optional[_Iterable[_Union[_types_pb2.SessionName, _Mapping]]] = ...) -> None: ...

class EvictResponse(_message.Message):
    __slots__ = ("evicted", "held", "missing", "missing_sessions")
    EVICTED_FIELD_NUMBER: _ClassVar[int]
    HELD_FIELD_NUMBER: _ClassVar[int]
    MISSING_FIELD_NUMBER: _ClassVar[int]
    MISSING_SESSIONS_FIELD_NUMBER: _ClassVar[int]
    evicted: int
    held: int
    missing: int
    missing_sessions: int
    def __init__(self, evicted: _Optional[int] = ..., held: _Optional[int] = ..., missing: _Optional[int] = ..., missing_sessions: _Optional[int] = ...) -> None: ...

class ReportRequestRequest(_message.Message):
    __slots__ = ("report",)
    REPORT_FIELD_NUMBER: _ClassVar[int]
    report: RequestReport
    def __init__(self, report: _Optional[_Union[RequestReport, _Mapping]] = ...) -> None: ...

class ReportRequestResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetGenerationRequest(_message.Message):
    __slots__ = ("layout_fingerprint",)
    LAYOUT_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    layout_fingerprint: bytes
    def __init__(self, layout_fingerprint: _Optional[bytes] = ...) -> None: ...

class GetGenerationResponse(_message.Message):
    __slots__ = ("generation",)
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    generation: int
    def __init__(self, generation: _Optional[int] = ...) -> None: ...

class BeginGenerationRequest(_message.Message):
    __slots__ = ("layout_fingerprint",)
    LAYOUT_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    layout_fingerprint: bytes
    def __init__(self, layout_fingerprint: _Optional[bytes] = ...) -> None: ...

class BeginGenerationResponse(_message.Message):
    __slots__ = ("generation",)
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    generation: int
    def __init__(self, generation: _Optional[int] = ...) -> None: ...

class RequestReport(_message.Message):
    __slots__ = ("report_id", "request_id", "client_name", "ago_ms", "plan", "plan_reason", "outcome", "outcome_reason", "history_tokens", "new_tokens", "loaded_tokens", "computed_tokens", "loaded_bytes", "tier", "transport", "estimates", "times")
    REPORT_ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    CLIENT_NAME_FIELD_NUMBER: _ClassVar[int]
    AGO_MS_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    PLAN_REASON_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_REASON_FIELD_NUMBER: _ClassVar[int]
    HISTORY_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NEW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    LOADED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    COMPUTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    LOADED_BYTES_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    ESTIMATES_FIELD_NUMBER: _ClassVar[int]
    TIMES_FIELD_NUMBER: _ClassVar[int]
    report_id: int
    request_id: str
    client_name: str
    ago_ms: int
    plan: RequestPlan
    plan_reason: str
    outcome: RequestOutcome
    outcome_reason: str
    history_tokens: int
    new_tokens: int
    loaded_tokens: int
    computed_tokens: int
    loaded_bytes: int
    tier: str
    transport: str
    estimates: PlanEstimates
    times: RequestTimes
    def __init__(self, report_id: _Optional[int] = ..., request_id: _Optional[str] = ..., client_name: _Optional[str] = ..., ago_ms: _Optional[int] = ..., plan: _Optional[_Union[RequestPlan, str]] = ..., plan_reason: _Optional[str] = ..., outcome: _Optional[_Union[RequestOutcome, str]] = ..., outcome_reason: _Optional[str] = ..., history_tokens: _Optional[int] = ..., new_tokens: _Optional[int] = ..., loaded_tokens: _Optional[int] = ..., computed_tokens: _Optional[int] = ..., loaded_bytes: _Optional[int] = ..., tier: _Optional[str] = ..., transport: _Optional[str] = ..., estimates: _Optional[_Union[PlanEstimates, _Mapping]] = ..., times: _Optional[_Union[RequestTimes, _Mapping]] = ...) -> None: ...

class PlanEstimates(_message.Message):
    __slots__ = ("load_ms", "recompute_ms", "mixed_ms")
    LOAD_MS_FIELD_NUMBER: _ClassVar[int]
    RECOMPUTE_MS_FIELD_NUMBER: _ClassVar[int]
    MIXED_MS_FIELD_NUMBER: _ClassVar[int]
    load_ms: float
    recompute_ms: float
    mixed_ms: float
    def __init__(self, load_ms: _Optional[float] = ..., recompute_ms: _Optional[float] = ..., mixed_ms: _Optional[float] = ...) -> None: ...

class RequestTimes(_message.Message):
    __slots__ = ("lookup_ms", "first_layer_ms", "load_ms", "waited_ms", "head_ms", "first_token_ms")
    LOOKUP_MS_FIELD_NUMBER: _ClassVar[int]
    FIRST_LAYER_MS_FIELD_NUMBER: _ClassVar[int]
    LOAD_MS_FIELD_NUMBER: _ClassVar[int]
    WAITED_MS_FIELD_NUMBER: _ClassVar[int]
    HEAD_MS_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_MS_FIELD_NUMBER: _ClassVar[int]
    lookup_ms: float
    first_layer_ms: float
    load_ms: float
    waited_ms: float
    head_ms: float
    first_token_ms: float
    def __init__(self, lookup_ms: _Optional[float] = ..., first_layer_ms: _Optional[float] = ..., load_ms: _Optional[float] = ..., waited_ms: _Optional[float] = ..., head_ms: _Optional[float] = ..., first_token_ms: _Optional[float] = ...) -> None: ...
