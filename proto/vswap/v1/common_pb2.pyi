from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class TierState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TIER_STATE_UNSPECIFIED: _ClassVar[TierState]
    TIER_STATE_ACTIVE: _ClassVar[TierState]
    TIER_STATE_DRAINING: _ClassVar[TierState]
    TIER_STATE_DRAINED: _ClassVar[TierState]
TIER_STATE_UNSPECIFIED: TierState
TIER_STATE_ACTIVE: TierState
TIER_STATE_DRAINING: TierState
TIER_STATE_DRAINED: TierState

class ErrorDetail(_message.Message):
    __slots__ = ("kind", "message", "fields_json")
    KIND_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    FIELDS_JSON_FIELD_NUMBER: _ClassVar[int]
    kind: str
    message: str
    fields_json: str
    def __init__(self, kind: _Optional[str] = ..., message: _Optional[str] = ..., fields_json: _Optional[str] = ...) -> None: ...

class TierSpec(_message.Message):
    __slots__ = ("name", "url", "codec", "capacity_bytes", "rank", "high", "low", "assert_noeviction", "verify_writes", "password_env", "password_file", "timeout_s", "redundancy", "urls")
    NAME_FIELD_NUMBER: _ClassVar[int]
    URL_FIELD_NUMBER: _ClassVar[int]
    CODEC_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_BYTES_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    HIGH_FIELD_NUMBER: _ClassVar[int]
    LOW_FIELD_NUMBER: _ClassVar[int]
    ASSERT_NOEVICTION_FIELD_NUMBER: _ClassVar[int]
    VERIFY_WRITES_FIELD_NUMBER: _ClassVar[int]
    PASSWORD_ENV_FIELD_NUMBER: _ClassVar[int]
    PASSWORD_FILE_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    REDUNDANCY_FIELD_NUMBER: _ClassVar[int]
    URLS_FIELD_NUMBER: _ClassVar[int]
    name: str
    url: str
    codec: str
    capacity_bytes: int
    rank: int
    high: float
    low: float
    assert_noeviction: bool
    verify_writes: bool
    password_env: str
    password_file: str
    timeout_s: float
    redundancy: str
    urls: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, name: _Optional[str] = ..., url: _Optional[str] = ..., codec: _Optional[str] = ..., capacity_bytes: _Optional[int] = ..., rank: _Optional[int] = ..., high: _Optional[float] = ..., low: _Optional[float] = ..., assert_noeviction: _Optional[bool] = ..., verify_writes: _Optional[bool] = ..., password_env: _Optional[str] = ..., password_file: _Optional[str] = ..., timeout_s: _Optional[float] = ..., redundancy: _Optional[str] = ..., urls: _Optional[_Iterable[str]] = ...) -> None: ...

class Tier(_message.Message):
    __slots__ = ("spec", "state")
    SPEC_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    spec: TierSpec
    state: TierState
    def __init__(self, spec: _Optional[_Union[TierSpec, _Mapping]] = ..., state: _Optional[_Union[TierState, str]] = ...) -> None: ...

class TierUsage(_message.Message):
    __slots__ = ("tier", "pages", "logical_bytes", "live_bytes", "stored_bytes", "segments", "limit_bytes", "quarantined", "deleting", "available", "local", "state", "rank", "error", "degraded_segments", "degraded_bytes", "repairable_bytes", "servers", "lost_pages")
    TIER_FIELD_NUMBER: _ClassVar[int]
    PAGES_FIELD_NUMBER: _ClassVar[int]
    LOGICAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    LIVE_BYTES_FIELD_NUMBER: _ClassVar[int]
    STORED_BYTES_FIELD_NUMBER: _ClassVar[int]
    SEGMENTS_FIELD_NUMBER: _ClassVar[int]
    LIMIT_BYTES_FIELD_NUMBER: _ClassVar[int]
    QUARANTINED_FIELD_NUMBER: _ClassVar[int]
    DELETING_FIELD_NUMBER: _ClassVar[int]
    AVAILABLE_FIELD_NUMBER: _ClassVar[int]
    LOCAL_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    DEGRADED_SEGMENTS_FIELD_NUMBER: _ClassVar[int]
    DEGRADED_BYTES_FIELD_NUMBER: _ClassVar[int]
    REPAIRABLE_BYTES_FIELD_NUMBER: _ClassVar[int]
    SERVERS_FIELD_NUMBER: _ClassVar[int]
    LOST_PAGES_FIELD_NUMBER: _ClassVar[int]
    tier: str
    pages: int
    logical_bytes: int
    live_bytes: int
    stored_bytes: int
    segments: int
    limit_bytes: int
    quarantined: int
    deleting: int
    available: bool
    local: bool
    state: TierState
    rank: int
    error: str
    degraded_segments: int
    degraded_bytes: int
    repairable_bytes: int
    servers: _containers.RepeatedCompositeFieldContainer[TierServer]
    lost_pages: int
    def __init__(self, tier: _Optional[str] = ..., pages: _Optional[int] = ..., logical_bytes: _Optional[int] = ..., live_bytes: _Optional[int] = ..., stored_bytes: _Optional[int] = ..., segments: _Optional[int] = ..., limit_bytes: _Optional[int] = ..., quarantined: _Optional[int] = ..., deleting: _Optional[int] = ..., available: _Optional[bool] = ..., local: _Optional[bool] = ..., state: _Optional[_Union[TierState, str]] = ..., rank: _Optional[int] = ..., error: _Optional[str] = ..., degraded_segments: _Optional[int] = ..., degraded_bytes: _Optional[int] = ..., repairable_bytes: _Optional[int] = ..., servers: _Optional[_Iterable[_Union[TierServer, _Mapping]]] = ..., lost_pages: _Optional[int] = ...) -> None: ...

class TierServer(_message.Message):
    __slots__ = ("url", "up", "error", "only_here")
    URL_FIELD_NUMBER: _ClassVar[int]
    UP_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    ONLY_HERE_FIELD_NUMBER: _ClassVar[int]
    url: str
    up: bool
    error: str
    only_here: int
    def __init__(self, url: _Optional[str] = ..., up: _Optional[bool] = ..., error: _Optional[str] = ..., only_here: _Optional[int] = ...) -> None: ...
