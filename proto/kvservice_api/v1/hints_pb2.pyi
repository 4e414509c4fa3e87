from kvservice_api.v1 import types_pb2 as _types_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Readiness(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    READINESS_UNSPECIFIED: _ClassVar[Readiness]
    READINESS_IN_DRAM: _ClassVar[Readiness]
    READINESS_COMING: _ClassVar[Readiness]
    READINESS_ON_SSD: _ClassVar[Readiness]
    READINESS_ABSENT: _ClassVar[Readiness]
READINESS_UNSPECIFIED: Readiness
READINESS_IN_DRAM: Readiness
READINESS_COMING: Readiness
READINESS_ON_SSD: Readiness
READINESS_ABSENT: Readiness

class ExchangeRequest(_message.Message):
    __slots__ = ("client_id", "whole_queue", "changes", "hints")
    CLIENT_ID_FIELD_NUMBER: _ClassVar[int]
    WHOLE_QUEUE_FIELD_NUMBER: _ClassVar[int]
    CHANGES_FIELD_NUMBER: _ClassVar[int]
    HINTS_FIELD_NUMBER: _ClassVar[int]
    client_id: bytes
    whole_queue: bool
    changes: _containers.RepeatedCompositeFieldContainer[QueueChange]
    hints: _containers.RepeatedCompositeFieldContainer[Hint]
    def __init__(self, client_id: _Optional[bytes] = ..., whole_queue: bool = ..., changes: _Optional[_Iterable[_Union[QueueChange, _Mapping]]] = ..., hints: _Optional[_Iterable[_Union[Hint, _Mapping]]] = ...) -> None: ...

class QueueChange(_message.Message):
    __slots__ = ("put", "remove")
    PUT_FIELD_NUMBER: _ClassVar[int]
    REMOVE_FIELD_NUMBER: _ClassVar[int]
    put: QueuedRequest
    remove: str
    def __init__(self, put: _Optional[_Union[QueuedRequest, _Mapping]] = ..., remove: _Optional[str] = ...) -> None: ...

class QueuedRequest(_message.Message):
    __slots__ = ("request_id", "reads", "starts_in_ms", "priority", "before")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    READS_FIELD_NUMBER: _ClassVar[int]
    STARTS_IN_MS_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    BEFORE_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    reads: HintSubject
    starts_in_ms: int
    priority: int
    before: str
    def __init__(self, request_id: _Optional[str] = ..., reads: _Optional[_Union[HintSubject, _Mapping]] = ..., starts_in_ms: _Optional[int] = ..., priority: _Optional[int] = ..., before: _Optional[str] = ...) -> None: ...

class HintSubject(_message.Message):
    __slots__ = ("session", "keys")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    session: _types_pb2.SessionName
    keys: bytes
    def __init__(self, session: _Optional[_Union[_types_pb2.SessionName, _Mapping]] = ..., keys: _Optional[bytes] = ...) -> None: ...

class Hint(_message.Message):
    __slots__ = ("subject", "turn_finished", "typing", "tool_call", "session_ended", "do_not_keep")
    SUBJECT_FIELD_NUMBER: _ClassVar[int]
    TURN_FINISHED_FIELD_NUMBER: _ClassVar[int]
    TYPING_FIELD_NUMBER: _ClassVar[int]
    TOOL_CALL_FIELD_NUMBER: _ClassVar[int]
    SESSION_ENDED_FIELD_NUMBER: _ClassVar[int]
    DO_NOT_KEEP_FIELD_NUMBER: _ClassVar[int]
    subject: HintSubject
    turn_finished: TurnFinished
    typing: Typing
    tool_call: ToolCall
    session_ended: SessionEnded
    do_not_keep: DoNotKeep
    def __init__(self, subject: _Optional[_Union[HintSubject, _Mapping]] = ..., turn_finished: _Optional[_Union[TurnFinished, _Mapping]] = ..., typing: _Optional[_Union[Typing, _Mapping]] = ..., tool_call: _Optional[_Union[ToolCall, _Mapping]] = ..., session_ended: _Optional[_Union[SessionEnded, _Mapping]] = ..., do_not_keep: _Optional[_Union[DoNotKeep, _Mapping]] = ...) -> None: ...

class TurnFinished(_message.Message):
    __slots__ = ("prompt_tokens", "answer_tokens", "stop_reason")
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ANSWER_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STOP_REASON_FIELD_NUMBER: _ClassVar[int]
    prompt_tokens: int
    answer_tokens: int
    stop_reason: str
    def __init__(self, prompt_tokens: _Optional[int] = ..., answer_tokens: _Optional[int] = ..., stop_reason: _Optional[str] = ...) -> None: ...

class Typing(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ToolCall(_message.Message):
    __slots__ = ("name", "expected_ms")
    NAME_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_MS_FIELD_NUMBER: _ClassVar[int]
    name: str
    expected_ms: int
    def __init__(self, name: _Optional[str] = ..., expected_ms: _Optional[int] = ...) -> None: ...

class SessionEnded(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DoNotKeep(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ExchangeResponse(_message.Message):
    __slots__ = ("limits", "readiness")
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    READINESS_FIELD_NUMBER: _ClassVar[int]
    limits: HintLimits
    readiness: _containers.RepeatedCompositeFieldContainer[RequestReadiness]
    def __init__(self, limits: _Optional[_Union[HintLimits, _Mapping]] = ..., readiness: _Optional[_Iterable[_Union[RequestReadiness, _Mapping]]] = ...) -> None: ...

class HintLimits(_message.Message):
    __slots__ = ("max_queued_requests", "max_queued_keys")
    MAX_QUEUED_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    MAX_QUEUED_KEYS_FIELD_NUMBER: _ClassVar[int]
    max_queued_requests: int
    max_queued_keys: int
    def __init__(self, max_queued_requests: _Optional[int] = ..., max_queued_keys: _Optional[int] = ...) -> None: ...

class RequestReadiness(_message.Message):
    __slots__ = ("request_id", "readiness", "ready_in_ms")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    READINESS_FIELD_NUMBER: _ClassVar[int]
    READY_IN_MS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    readiness: Readiness
    ready_in_ms: int
    def __init__(self, request_id: _Optional[str] = ..., readiness: _Optional[_Union[Readiness, str]] = ..., ready_in_ms: _Optional[int] = ...) -> None: ...
