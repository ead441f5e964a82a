from vswap.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class RequestTag(_message.Message):
    __slots__ = ("session", "number", "oldest_open")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    OLDEST_OPEN_FIELD_NUMBER: _ClassVar[int]
    session: int
    number: int
    oldest_open: int
    def __init__(self, session: _Optional[int] = ..., number: _Optional[int] = ..., oldest_open: _Optional[int] = ...) -> None: ...

class StoreRequest(_message.Message):
    __slots__ = ("space", "slots", "pages", "tag")
    SPACE_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    PAGES_FIELD_NUMBER: _ClassVar[int]
    TAG_FIELD_NUMBER: _ClassVar[int]
    space: str
    slots: bytes
    pages: bytes
    tag: RequestTag
    def __init__(self, space: _Optional[str] = ..., slots: _Optional[bytes] = ..., pages: _Optional[bytes] = ..., tag: _Optional[_Union[RequestTag, _Mapping]] = ...) -> None: ...

class StoreReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class LoadRequest(_message.Message):
    __slots__ = ("space", "slots", "exclusive", "tag")
    SPACE_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    EXCLUSIVE_FIELD_NUMBER: _ClassVar[int]
    TAG_FIELD_NUMBER: _ClassVar[int]
    space: str
    slots: bytes
    exclusive: bool
    tag: RequestTag
    def __init__(self, space: _Optional[str] = ..., slots: _Optional[bytes] = ..., exclusive: _Optional[bool] = ..., tag: _Optional[_Union[RequestTag, _Mapping]] = ...) -> None: ...

class LoadReply(_message.Message):
    __slots__ = ("pages", "token")
    PAGES_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    pages: bytes
    token: int
    def __init__(self, pages: _Optional[bytes] = ..., token: _Optional[int] = ...) -> None: ...

class ConfirmRequest(_message.Message):
    __slots__ = ("space", "token", "tag")
    SPACE_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    TAG_FIELD_NUMBER: _ClassVar[int]
    space: str
    token: int
    tag: RequestTag
    def __init__(self, space: _Optional[str] = ..., token: _Optional[int] = ..., tag: _Optional[_Union[RequestTag, _Mapping]] = ...) -> None: ...

class ConfirmReply(_message.Message):
    __slots__ = ("freed",)
    FREED_FIELD_NUMBER: _ClassVar[int]
    freed: int
    def __init__(self, freed: _Optional[int] = ...) -> None: ...

class FreeRequest(_message.Message):
    __slots__ = ("space", "slots", "tag")
    SPACE_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    TAG_FIELD_NUMBER: _ClassVar[int]
    space: str
    slots: bytes
    tag: RequestTag
    def __init__(self, space: _Optional[str] = ..., slots: _Optional[bytes] = ..., tag: _Optional[_Union[RequestTag, _Mapping]] = ...) -> None: ...

class FreeReply(_message.Message):
    __slots__ = ("freed",)
    FREED_FIELD_NUMBER: _ClassVar[int]
    freed: int
    def __init__(self, freed: _Optional[int] = ...) -> None: ...

class LocateRequest(_message.Message):
    __slots__ = ("space", "slots")
    SPACE_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    space: str
    slots: bytes
    def __init__(self, space: _Optional[str] = ..., slots: _Optional[bytes] = ...) -> None: ...

class LocateReply(_message.Message):
    __slots__ = ("places", "names")
    PLACES_FIELD_NUMBER: _ClassVar[int]
    NAMES_FIELD_NUMBER: _ClassVar[int]
    places: bytes
    names: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, places: _Optional[bytes] = ..., names: _Optional[_Iterable[str]] = ...) -> None: ...

class SpaceLimits(_message.Message):
    __slots__ = ("quota_bytes", "tiers", "tier_max_bytes")
    class TierMaxBytesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    QUOTA_BYTES_FIELD_NUMBER: _ClassVar[int]
    TIERS_FIELD_NUMBER: _ClassVar[int]
    TIER_MAX_BYTES_FIELD_NUMBER: _ClassVar[int]
    quota_bytes: int
    tiers: _containers.RepeatedScalarFieldContainer[str]
    tier_max_bytes: _containers.ScalarMap[str, int]
    def __init__(self, quota_bytes: _Optional[int] = ..., tiers: _Optional[_Iterable[str]] = ..., tier_max_bytes: _Optional[_Mapping[str, int]] = ...) -> None: ...

class Space(_message.Message):
    __slots__ = ("name", "page_bytes", "max_slots", "limits", "pages", "fill_pages", "live_bytes", "peak_bytes", "unreadable_pages", "tier_pages", "tier_bytes", "events")
    class TierPagesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    class TierBytesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    class EventsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    NAME_FIELD_NUMBER: _ClassVar[int]
    PAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_SLOTS_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    PAGES_FIELD_NUMBER: _ClassVar[int]
    FILL_PAGES_FIELD_NUMBER: _ClassVar[int]
    LIVE_BYTES_FIELD_NUMBER: _ClassVar[int]
    PEAK_BYTES_FIELD_NUMBER: _ClassVar[int]
    UNREADABLE_PAGES_FIELD_NUMBER: _ClassVar[int]
    TIER_PAGES_FIELD_NUMBER: _ClassVar[int]
    TIER_BYTES_FIELD_NUMBER: _ClassVar[int]
    EVENTS_FIELD_NUMBER: _ClassVar[int]
    name: str
    page_bytes: int
    max_slots: int
    limits: SpaceLimits
    pages: int
    fill_pages: int
    live_bytes: int
    peak_bytes: int
    unreadable_pages: int
    tier_pages: _containers.ScalarMap[str, int]
    tier_bytes: _containers.ScalarMap[str, int]
    events: _containers.ScalarMap[str, int]
    def __init__(self, name: _Optional[str] = ..., page_bytes: _Optional[int] = ..., max_slots: _Optional[int] = ..., limits: _Optional[_Union[SpaceLimits, _Mapping]] = ..., pages: _Optional[int] = ..., fill_pages: _Optional[int] = ..., live_bytes: _Optional[int] = ..., peak_bytes: _Optional[int] = ..., unreadable_pages: _Optional[int] = ..., tier_pages: _Optional[_Mapping[str, int]] = ..., tier_bytes: _Optional[_Mapping[str, int]] = ..., events: _Optional[_Mapping[str, int]] = ...) -> None: ...

class CreateSpaceRequest(_message.Message):
    __slots__ = ("name", "page_bytes", "max_slots", "limits", "exist_ok")
    NAME_FIELD_NUMBER: _ClassVar[int]
    PAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_SLOTS_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    EXIST_OK_FIELD_NUMBER: _ClassVar[int]
    name: str
    page_bytes: int
    max_slots: int
    limits: SpaceLimits
    exist_ok: bool
    def __init__(self, name: _Optional[str] = ..., page_bytes: _Optional[int] = ..., max_slots: _Optional[int] = ..., limits: _Optional[_Union[SpaceLimits, _Mapping]] = ..., exist_ok: _Optional[bool] = ...) -> None: ...

class SetSpaceRequest(_message.Message):
    __slots__ = ("name", "limits", "max_slots")
    NAME_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    MAX_SLOTS_FIELD_NUMBER: _ClassVar[int]
    name: str
    limits: SpaceLimits
    max_slots: int
    def __init__(self, name: _Optional[str] = ..., limits: _Optional[_Union[SpaceLimits, _Mapping]] = ..., max_slots: _Optional[int] = ...) -> None: ...

class DeleteSpaceRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class DeleteSpaceReply(_message.Message):
    __slots__ = ("pages",)
    PAGES_FIELD_NUMBER: _ClassVar[int]
    pages: int
    def __init__(self, pages: _Optional[int] = ...) -> None: ...

class ListSpacesRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListSpacesReply(_message.Message):
    __slots__ = ("spaces",)
    SPACES_FIELD_NUMBER: _ClassVar[int]
    spaces: _containers.RepeatedCompositeFieldContainer[Space]
    def __init__(self, spaces: _Optional[_Iterable[_Union[Space, _Mapping]]] = ...) -> None: ...

class GetNodeRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class NodeStatus(_message.Message):
    __slots__ = ("name", "shard_uuid", "cluster_uuid", "incarnation", "version", "coordinator", "generation", "tiers", "pages", "fill_pages", "usable_free_bytes", "usable_total_bytes", "counters", "batch_max_pages_bytes", "pid", "nbd", "places", "faults_allowed", "faults")
    class CountersEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    class FaultsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    NAME_FIELD_NUMBER: _ClassVar[int]
    SHARD_UUID_FIELD_NUMBER: _ClassVar[int]
    CLUSTER_UUID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    COORDINATOR_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    TIERS_FIELD_NUMBER: _ClassVar[int]
    PAGES_FIELD_NUMBER: _ClassVar[int]
    FILL_PAGES_FIELD_NUMBER: _ClassVar[int]
    USABLE_FREE_BYTES_FIELD_NUMBER: _ClassVar[int]
    USABLE_TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    COUNTERS_FIELD_NUMBER: _ClassVar[int]
    BATCH_MAX_PAGES_BYTES_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    NBD_FIELD_NUMBER: _ClassVar[int]
    PLACES_FIELD_NUMBER: _ClassVar[int]
    FAULTS_ALLOWED_FIELD_NUMBER: _ClassVar[int]
    FAULTS_FIELD_NUMBER: _ClassVar[int]
    name: str
    shard_uuid: str
    cluster_uuid: str
    incarnation: int
    version: str
    coordinator: str
    generation: int
    tiers: _containers.RepeatedCompositeFieldContainer[_common_pb2.TierUsage]
    pages: int
    fill_pages: int
    usable_free_bytes: int
    usable_total_bytes: int
    counters: _containers.ScalarMap[str, int]
    batch_max_pages_bytes: int
    pid: int
    nbd: _containers.RepeatedScalarFieldContainer[str]
    places: _containers.RepeatedScalarFieldContainer[str]
    faults_allowed: bool
    faults: _containers.ScalarMap[str, str]
    def __init__(self, name: _Optional[str] = ..., shard_uuid: _Optional[str] = ..., cluster_uuid: _Optional[str] = ..., incarnation: _Optional[int] = ..., version: _Optional[str] = ..., coordinator: _Optional[str] = ..., generation: _Optional[int] = ..., tiers: _Optional[_Iterable[_Union[_common_pb2.TierUsage, _Mapping]]] = ..., pages: _Optional[int] = ..., fill_pages: _Optional[int] = ..., usable_free_bytes: _Optional[int] = ..., usable_total_bytes: _Optional[int] = ..., counters: _Optional[_Mapping[str, int]] = ..., batch_max_pages_bytes: _Optional[int] = ..., pid: _Optional[int] = ..., nbd: _Optional[_Iterable[str]] = ..., places: _Optional[_Iterable[str]] = ..., faults_allowed: _Optional[bool] = ..., faults: _Optional[_Mapping[str, str]] = ...) -> None: ...

class SetFaultRequest(_message.Message):
    __slots__ = ("tier", "plan")
    TIER_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    tier: str
    plan: str
    def __init__(self, tier: _Optional[str] = ..., plan: _Optional[str] = ...) -> None: ...

class SetFaultReply(_message.Message):
    __slots__ = ("before",)
    BEFORE_FIELD_NUMBER: _ClassVar[int]
    before: str
    def __init__(self, before: _Optional[str] = ...) -> None: ...

class CheckRequest(_message.Message):
    __slots__ = ("deep",)
    DEEP_FIELD_NUMBER: _ClassVar[int]
    deep: bool
    def __init__(self, deep: _Optional[bool] = ...) -> None: ...

class Difference(_message.Message):
    __slots__ = ("kind", "where", "detail")
    KIND_FIELD_NUMBER: _ClassVar[int]
    WHERE_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    kind: str
    where: str
    detail: str
    def __init__(self, kind: _Optional[str] = ..., where: _Optional[str] = ..., detail: _Optional[str] = ...) -> None: ...

class CheckProgress(_message.Message):
    __slots__ = ("slots", "segments", "listed", "found", "differences", "skipped", "done", "others")
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    SEGMENTS_FIELD_NUMBER: _ClassVar[int]
    LISTED_FIELD_NUMBER: _ClassVar[int]
    FOUND_FIELD_NUMBER: _ClassVar[int]
    DIFFERENCES_FIELD_NUMBER: _ClassVar[int]
    SKIPPED_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    OTHERS_FIELD_NUMBER: _ClassVar[int]
    slots: int
    segments: int
    listed: int
    found: int
    differences: _containers.RepeatedCompositeFieldContainer[Difference]
    skipped: _containers.RepeatedScalarFieldContainer[str]
    done: bool
    others: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, slots: _Optional[int] = ..., segments: _Optional[int] = ..., listed: _Optional[int] = ..., found: _Optional[int] = ..., differences: _Optional[_Iterable[_Union[Difference, _Mapping]]] = ..., skipped: _Optional[_Iterable[str]] = ..., done: _Optional[bool] = ..., others: _Optional[_Iterable[str]] = ...) -> None: ...

class ScrubRequest(_message.Message):
    __slots__ = ("tier", "rate_bytes_s")
    TIER_FIELD_NUMBER: _ClassVar[int]
    RATE_BYTES_S_FIELD_NUMBER: _ClassVar[int]
    tier: str
    rate_bytes_s: int
    def __init__(self, tier: _Optional[str] = ..., rate_bytes_s: _Optional[int] = ...) -> None: ...

class ScrubProgress(_message.Message):
    __slots__ = ("segments", "bytes", "segments_left", "damaged_pages", "lost_pages", "bad_parts", "skipped", "error", "done", "lost")
    SEGMENTS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    SEGMENTS_LEFT_FIELD_NUMBER: _ClassVar[int]
    DAMAGED_PAGES_FIELD_NUMBER: _ClassVar[int]
    LOST_PAGES_FIELD_NUMBER: _ClassVar[int]
    BAD_PARTS_FIELD_NUMBER: _ClassVar[int]
    SKIPPED_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    LOST_FIELD_NUMBER: _ClassVar[int]
    segments: int
    bytes: int
    segments_left: int
    damaged_pages: int
    lost_pages: int
    bad_parts: int
    skipped: int
    error: str
    done: bool
    lost: _containers.RepeatedCompositeFieldContainer[LostSlots]
    def __init__(self, segments: _Optional[int] = ..., bytes: _Optional[int] = ..., segments_left: _Optional[int] = ..., damaged_pages: _Optional[int] = ..., lost_pages: _Optional[int] = ..., bad_parts: _Optional[int] = ..., skipped: _Optional[int] = ..., error: _Optional[str] = ..., done: _Optional[bool] = ..., lost: _Optional[_Iterable[_Union[LostSlots, _Mapping]]] = ...) -> None: ...

class LostSlots(_message.Message):
    __slots__ = ("space", "slots")
    SPACE_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    space: str
    slots: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, space: _Optional[str] = ..., slots: _Optional[_Iterable[int]] = ...) -> None: ...

class LeaveRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class LeaveReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
