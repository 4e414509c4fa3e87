import datetime

from google.protobuf import timestamp_pb2 as _timestamp_pb2
from kvservice_api.v1 import blocks_pb2 as _blocks_pb2
from kvservice_api.v1 import types_pb2 as _types_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Session(_message.Message):
    __slots__ = ("session_id", "layout_fingerprint", "revision", "tip", "tail_tokens", "token_count", "slice_count", "cuts", "created_at", "used_at", "expires_at", "slices")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    TIP_FIELD_NUMBER: _ClassVar[int]
    TAIL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_COUNT_FIELD_NUMBER: _ClassVar[int]
    SLICE_COUNT_FIELD_NUMBER: _ClassVar[int]
    CUTS_FIELD_NUMBER: _ClassVar[int]
    CREATED_AT_FIELD_NUMBER: _ClassVar[int]
    USED_AT_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_AT_FIELD_NUMBER: _ClassVar[int]
    SLICES_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    layout_fingerprint: bytes
    revision: int
    tip: bytes
    tail_tokens: int
    token_count: int
    slice_count: int
    cuts: int
    created_at: _timestamp_pb2.Timestamp
    used_at: _timestamp_pb2.Timestamp
    expires_at: _timestamp_pb2.Timestamp
    slices: SessionSlices
    def __init__(self, session_id: _Optional[str] = ..., layout_fingerprint: _Optional[bytes] = ..., revision: _Optional[int] = ..., tip: _Optional[bytes] = ..., tail_tokens: _Optional[int] = ..., token_count: _Optional[int] = ..., slice_count: _Optional[int] = ..., cuts: _Optional[int] = ..., created_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., used_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., expires_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., slices: _Optional[_Union[SessionSlices, _Mapping]] = ...) -> None: ...

class SessionSlices(_message.Message):
    __slots__ = ("keys", "first_token", "token_count", "block_tokens", "stored_position", "positions")
    KEYS_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_FIELD_NUMBER: _ClassVar[int]
    TOKEN_COUNT_FIELD_NUMBER: _ClassVar[int]
    BLOCK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STORED_POSITION_FIELD_NUMBER: _ClassVar[int]
    POSITIONS_FIELD_NUMBER: _ClassVar[int]
    keys: bytes
    first_token: _containers.RepeatedScalarFieldContainer[int]
    token_count: _containers.RepeatedScalarFieldContainer[int]
    block_tokens: _containers.RepeatedScalarFieldContainer[int]
    stored_position: _containers.RepeatedScalarFieldContainer[int]
    positions: _containers.RepeatedCompositeFieldContainer[SlicePositions]
    def __init__(self, keys: _Optional[bytes] = ..., first_token: _Optional[_Iterable[int]] = ..., token_count: _Optional[_Iterable[int]] = ..., block_tokens: _Optional[_Iterable[int]] = ..., stored_position: _Optional[_Iterable[int]] = ..., positions: _Optional[_Iterable[_Union[SlicePositions, _Mapping]]] = ...) -> None: ...

class SlicePositions(_message.Message):
    __slots__ = ("slice", "positions")
    SLICE_FIELD_NUMBER: _ClassVar[int]
    POSITIONS_FIELD_NUMBER: _ClassVar[int]
    slice: int
    positions: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, slice: _Optional[int] = ..., positions: _Optional[_Iterable[int]] = ...) -> None: ...

class TokenRange(_message.Message):
    __slots__ = ("first", "count")
    FIRST_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    first: int
    count: int
    def __init__(self, first: _Optional[int] = ..., count: _Optional[int] = ...) -> None: ...

class AppendTurnRequest(_message.Message):
    __slots__ = ("session_id", "layout_fingerprint", "expected_revision", "parent_key", "keys", "last_block_tokens", "stored_position", "stored_positions")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_REVISION_FIELD_NUMBER: _ClassVar[int]
    PARENT_KEY_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    LAST_BLOCK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STORED_POSITION_FIELD_NUMBER: _ClassVar[int]
    STORED_POSITIONS_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    layout_fingerprint: bytes
    expected_revision: int
    parent_key: bytes
    keys: bytes
    last_block_tokens: int
    stored_position: int
    stored_positions: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, session_id: _Optional[str] = ..., layout_fingerprint: _Optional[bytes] = ..., expected_revision: _Optional[int] = ..., parent_key: _Optional[bytes] = ..., keys: _Optional[bytes] = ..., last_block_tokens: _Optional[int] = ..., stored_position: _Optional[int] = ..., stored_positions: _Optional[_Iterable[int]] = ...) -> None: ...

class AppendTurnResponse(_message.Message):
    __slots__ = ("session",)
    SESSION_FIELD_NUMBER: _ClassVar[int]
    session: Session
    def __init__(self, session: _Optional[_Union[Session, _Mapping]] = ...) -> None: ...

class GetSessionRequest(_message.Message):
    __slots__ = ("session_id", "layout_fingerprint", "shard")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    SHARD_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    layout_fingerprint: bytes
    shard: _types_pb2.Shard
    def __init__(self, session_id: _Optional[str] = ..., layout_fingerprint: _Optional[bytes] = ..., shard: _Optional[_Union[_types_pb2.Shard, _Mapping]] = ...) -> None: ...

class GetSessionResponse(_message.Message):
    __slots__ = ("session", "stored_slices", "stored_tokens", "runs")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    STORED_SLICES_FIELD_NUMBER: _ClassVar[int]
    STORED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    RUNS_FIELD_NUMBER: _ClassVar[int]
    session: Session
    stored_slices: int
    stored_tokens: int
    runs: _containers.RepeatedCompositeFieldContainer[_blocks_pb2.ResidencyRun]
    def __init__(self, session: _Optional[_Union[Session, _Mapping]] = ..., stored_slices: _Optional[int] = ..., stored_tokens: _Optional[int] = ..., runs: _Optional[_Iterable[_Union[_blocks_pb2.ResidencyRun, _Mapping]]] = ...) -> None: ...

class TruncateSessionRequest(_message.Message):
    __slots__ = ("session_id", "layout_fingerprint", "expected_revision", "keep")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_REVISION_FIELD_NUMBER: _ClassVar[int]
    KEEP_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    layout_fingerprint: bytes
    expected_revision: int
    keep: _containers.RepeatedCompositeFieldContainer[TokenRange]
    def __init__(self, session_id: _Optional[str] = ..., layout_fingerprint: _Optional[bytes] = ..., expected_revision: _Optional[int] = ..., keep: _Optional[_Iterable[_Union[TokenRange, _Mapping]]] = ...) -> None: ...

class TruncateSessionResponse(_message.Message):
    __slots__ = ("session",)
    SESSION_FIELD_NUMBER: _ClassVar[int]
    session: Session
    def __init__(self, session: _Optional[_Union[Session, _Mapping]] = ...) -> None: ...

class ForkSessionRequest(_message.Message):
    __slots__ = ("session_id", "layout_fingerprint", "new_session_id", "expected_revision")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    NEW_SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_REVISION_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    layout_fingerprint: bytes
    new_session_id: str
    expected_revision: int
    def __init__(self, session_id: _Optional[str] = ..., layout_fingerprint: _Optional[bytes] = ..., new_session_id: _Optional[str] = ..., expected_revision: _Optional[int] = ...) -> None: ...

class ForkSessionResponse(_message.Message):
    __slots__ = ("session",)
    SESSION_FIELD_NUMBER: _ClassVar[int]
    session: Session
    def __init__(self, session: _Optional[_Union[Session, _Mapping]] = ...) -> None: ...

class EndSessionRequest(_message.Message):
    __slots__ = ("session_id", "layout_fingerprint")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    layout_fingerprint: bytes
    def __init__(self, session_id: _Optional[str] = ..., layout_fingerprint: _Optional[bytes] = ...) -> None: ...

class EndSessionResponse(_message.Message):
    __slots__ = ("ended",)
    ENDED_FIELD_NUMBER: _ClassVar[int]
    ended: bool
    def __init__(self, ended: bool = ...) -> None: ...

class RestoreSessionRequest(_message.Message):
    __slots__ = ("session", "expected_revision")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_REVISION_FIELD_NUMBER: _ClassVar[int]
    session: Session
    expected_revision: int
    def __init__(self, session: _Optional[_Union[Session, _Mapping]] = ..., expected_revision: _Optional[int] = ...) -> None: ...

class RestoreSessionResponse(_message.Message):
    __slots__ = ("session", "changed")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    CHANGED_FIELD_NUMBER: _ClassVar[int]
    session: Session
    changed: bool
    def __init__(self, session: _Optional[_Union[Session, _Mapping]] = ..., changed: bool = ...) -> None: ...
