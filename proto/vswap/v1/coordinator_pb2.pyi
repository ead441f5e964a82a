from vswap.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class MoveKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    MOVE_KIND_UNSPECIFIED: _ClassVar[MoveKind]
    MOVE_KIND_DRAIN: _ClassVar[MoveKind]
    MOVE_KIND_MIGRATE: _ClassVar[MoveKind]
    MOVE_KIND_COMPACT: _ClassVar[MoveKind]
    MOVE_KIND_REPAIR: _ClassVar[MoveKind]

class JobState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    JOB_STATE_UNSPECIFIED: _ClassVar[JobState]
    JOB_STATE_RUNNING: _ClassVar[JobState]
    JOB_STATE_BLOCKED: _ClassVar[JobState]
    JOB_STATE_DONE: _ClassVar[JobState]
    JOB_STATE_CANCELLED: _ClassVar[JobState]
    JOB_STATE_FAILED: _ClassVar[JobState]
    JOB_STATE_PLANNED: _ClassVar[JobState]
MOVE_KIND_UNSPECIFIED: MoveKind
MOVE_KIND_DRAIN: MoveKind
MOVE_KIND_MIGRATE: MoveKind
MOVE_KIND_COMPACT: MoveKind
MOVE_KIND_REPAIR: MoveKind
JOB_STATE_UNSPECIFIED: JobState
JOB_STATE_RUNNING: JobState
JOB_STATE_BLOCKED: JobState
JOB_STATE_DONE: JobState
JOB_STATE_CANCELLED: JobState
JOB_STATE_FAILED: JobState
JOB_STATE_PLANNED: JobState

class NodeMessage(_message.Message):
    __slots__ = ("hello", "report", "generation_ack", "grant_request", "goodbye")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    REPORT_FIELD_NUMBER: _ClassVar[int]
    GENERATION_ACK_FIELD_NUMBER: _ClassVar[int]
    GRANT_REQUEST_FIELD_NUMBER: _ClassVar[int]
    GOODBYE_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    report: Report
    generation_ack: GenerationAck
    grant_request: GrantRequest
    goodbye: Goodbye
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., report: _Optional[_Union[Report, _Mapping]] = ..., generation_ack: _Optional[_Union[GenerationAck, _Mapping]] = ..., grant_request: _Optional[_Union[GrantRequest, _Mapping]] = ..., goodbye: _Optional[_Union[Goodbye, _Mapping]] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("node", "shard_uuid", "incarnation", "address", "version", "cluster_uuid", "generation", "grants", "tiers")
    NODE_FIELD_NUMBER: _ClassVar[int]
    SHARD_UUID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    CLUSTER_UUID_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    GRANTS_FIELD_NUMBER: _ClassVar[int]
    TIERS_FIELD_NUMBER: _ClassVar[int]
    node: str
    shard_uuid: str
    incarnation: int
    address: str
    version: str
    cluster_uuid: str
    generation: int
    grants: _containers.RepeatedCompositeFieldContainer[Grant]
    tiers: _containers.RepeatedCompositeFieldContainer[_common_pb2.TierUsage]
    def __init__(self, node: _Optional[str] = ..., shard_uuid: _Optional[str] = ..., incarnation: _Optional[int] = ..., address: _Optional[str] = ..., version: _Optional[str] = ..., cluster_uuid: _Optional[str] = ..., generation: _Optional[int] = ..., grants: _Optional[_Iterable[_Union[Grant, _Mapping]]] = ..., tiers: _Optional[_Iterable[_Union[_common_pb2.TierUsage, _Mapping]]] = ...) -> None: ...

class Report(_message.Message):
    __slots__ = ("tiers", "grants", "directives", "pages", "fill_pages", "ages")
    TIERS_FIELD_NUMBER: _ClassVar[int]
    GRANTS_FIELD_NUMBER: _ClassVar[int]
    DIRECTIVES_FIELD_NUMBER: _ClassVar[int]
    PAGES_FIELD_NUMBER: _ClassVar[int]
    FILL_PAGES_FIELD_NUMBER: _ClassVar[int]
    AGES_FIELD_NUMBER: _ClassVar[int]
    tiers: _containers.RepeatedCompositeFieldContainer[_common_pb2.TierUsage]
    grants: _containers.RepeatedCompositeFieldContainer[Grant]
    directives: _containers.RepeatedCompositeFieldContainer[DirectiveProgress]
    pages: int
    fill_pages: int
    ages: _containers.RepeatedCompositeFieldContainer[AgeBucket]
    def __init__(self, tiers: _Optional[_Iterable[_Union[_common_pb2.TierUsage, _Mapping]]] = ..., grants: _Optional[_Iterable[_Union[Grant, _Mapping]]] = ..., directives: _Optional[_Iterable[_Union[DirectiveProgress, _Mapping]]] = ..., pages: _Optional[int] = ..., fill_pages: _Optional[int] = ..., ages: _Optional[_Iterable[_Union[AgeBucket, _Mapping]]] = ...) -> None: ...

class AgeBucket(_message.Message):
    __slots__ = ("tier", "older_than_s", "live_bytes")
    TIER_FIELD_NUMBER: _ClassVar[int]
    OLDER_THAN_S_FIELD_NUMBER: _ClassVar[int]
    LIVE_BYTES_FIELD_NUMBER: _ClassVar[int]
    tier: str
    older_than_s: int
    live_bytes: int
    def __init__(self, tier: _Optional[str] = ..., older_than_s: _Optional[int] = ..., live_bytes: _Optional[int] = ...) -> None: ...

class GenerationAck(_message.Message):
    __slots__ = ("generation",)
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    generation: int
    def __init__(self, generation: _Optional[int] = ...) -> None: ...

class GrantRequest(_message.Message):
    __slots__ = ("tier", "total_bytes")
    TIER_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    tier: str
    total_bytes: int
    def __init__(self, tier: _Optional[str] = ..., total_bytes: _Optional[int] = ...) -> None: ...

class Goodbye(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class CoordinatorMessage(_message.Message):
    __slots__ = ("welcome", "configuration", "grant", "directive", "stop_directive", "farewell")
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    CONFIGURATION_FIELD_NUMBER: _ClassVar[int]
    GRANT_FIELD_NUMBER: _ClassVar[int]
    DIRECTIVE_FIELD_NUMBER: _ClassVar[int]
    STOP_DIRECTIVE_FIELD_NUMBER: _ClassVar[int]
    FAREWELL_FIELD_NUMBER: _ClassVar[int]
    welcome: Welcome
    configuration: Configuration
    grant: Grant
    directive: Directive
    stop_directive: StopDirective
    farewell: Farewell
    def __init__(self, welcome: _Optional[_Union[Welcome, _Mapping]] = ..., configuration: _Optional[_Union[Configuration, _Mapping]] = ..., grant: _Optional[_Union[Grant, _Mapping]] = ..., directive: _Optional[_Union[Directive, _Mapping]] = ..., stop_directive: _Optional[_Union[StopDirective, _Mapping]] = ..., farewell: _Optional[_Union[Farewell, _Mapping]] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("cluster_uuid", "lease_s")
    CLUSTER_UUID_FIELD_NUMBER: _ClassVar[int]
    LEASE_S_FIELD_NUMBER: _ClassVar[int]
    cluster_uuid: str
    lease_s: float
    def __init__(self, cluster_uuid: _Optional[str] = ..., lease_s: _Optional[float] = ...) -> None: ...

class Configuration(_message.Message):
    __slots__ = ("generation", "tiers")
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    TIERS_FIELD_NUMBER: _ClassVar[int]
    generation: int
    tiers: _containers.RepeatedCompositeFieldContainer[_common_pb2.Tier]
    def __init__(self, generation: _Optional[int] = ..., tiers: _Optional[_Iterable[_Union[_common_pb2.Tier, _Mapping]]] = ...) -> None: ...

class Grant(_message.Message):
    __slots__ = ("tier", "total_bytes")
    TIER_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    tier: str
    total_bytes: int
    def __init__(self, tier: _Optional[str] = ..., total_bytes: _Optional[int] = ...) -> None: ...

class Directive(_message.Message):
    __slots__ = ("job_id", "kind", "tier", "destination", "byte_budget", "older_than_s", "target_utilisation", "rate_bytes_s", "lost")
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    DESTINATION_FIELD_NUMBER: _ClassVar[int]
    BYTE_BUDGET_FIELD_NUMBER: _ClassVar[int]
    OLDER_THAN_S_FIELD_NUMBER: _ClassVar[int]
    TARGET_UTILISATION_FIELD_NUMBER: _ClassVar[int]
    RATE_BYTES_S_FIELD_NUMBER: _ClassVar[int]
    LOST_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    kind: MoveKind
    tier: str
    destination: str
    byte_budget: int
    older_than_s: float
    target_utilisation: float
    rate_bytes_s: int
    lost: bool
    def __init__(self, job_id: _Optional[str] = ..., kind: _Optional[_Union[MoveKind, str]] = ..., tier: _Optional[str] = ..., destination: _Optional[str] = ..., byte_budget: _Optional[int] = ..., older_than_s: _Optional[float] = ..., target_utilisation: _Optional[float] = ..., rate_bytes_s: _Optional[int] = ..., lost: _Optional[bool] = ...) -> None: ...

class StopDirective(_message.Message):
    __slots__ = ("job_id",)
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    def __init__(self, job_id: _Optional[str] = ...) -> None: ...

class Farewell(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DirectiveProgress(_message.Message):
    __slots__ = ("job_id", "state", "reason", "pages_moved", "bytes_moved", "logical_bytes_moved", "segments_freed", "pages_left", "bytes_left", "pages_lost")
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    PAGES_MOVED_FIELD_NUMBER: _ClassVar[int]
    BYTES_MOVED_FIELD_NUMBER: _ClassVar[int]
    LOGICAL_BYTES_MOVED_FIELD_NUMBER: _ClassVar[int]
    SEGMENTS_FREED_FIELD_NUMBER: _ClassVar[int]
    PAGES_LEFT_FIELD_NUMBER: _ClassVar[int]
    BYTES_LEFT_FIELD_NUMBER: _ClassVar[int]
    PAGES_LOST_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    state: str
    reason: str
    pages_moved: int
    bytes_moved: int
    logical_bytes_moved: int
    segments_freed: int
    pages_left: int
    bytes_left: int
    pages_lost: int
    def __init__(self, job_id: _Optional[str] = ..., state: _Optional[str] = ..., reason: _Optional[str] = ..., pages_moved: _Optional[int] = ..., bytes_moved: _Optional[int] = ..., logical_bytes_moved: _Optional[int] = ..., segments_freed: _Optional[int] = ..., pages_left: _Optional[int] = ..., bytes_left: _Optional[int] = ..., pages_lost: _Optional[int] = ...) -> None: ...

class GetClusterRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ClusterStatus(_message.Message):
    __slots__ = ("cluster_uuid", "version", "generation", "lease_s", "nodes", "tiers", "strangers")
    CLUSTER_UUID_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    LEASE_S_FIELD_NUMBER: _ClassVar[int]
    NODES_FIELD_NUMBER: _ClassVar[int]
    TIERS_FIELD_NUMBER: _ClassVar[int]
    STRANGERS_FIELD_NUMBER: _ClassVar[int]
    cluster_uuid: str
    version: str
    generation: int
    lease_s: float
    nodes: _containers.RepeatedCompositeFieldContainer[NodeInfo]
    tiers: _containers.RepeatedCompositeFieldContainer[TierInfo]
    strangers: _containers.RepeatedCompositeFieldContainer[Stranger]
    def __init__(self, cluster_uuid: _Optional[str] = ..., version: _Optional[str] = ..., generation: _Optional[int] = ..., lease_s: _Optional[float] = ..., nodes: _Optional[_Iterable[_Union[NodeInfo, _Mapping]]] = ..., tiers: _Optional[_Iterable[_Union[TierInfo, _Mapping]]] = ..., strangers: _Optional[_Iterable[_Union[Stranger, _Mapping]]] = ...) -> None: ...

class NodeInfo(_message.Message):
    __slots__ = ("name", "shard_uuid", "address", "state", "last_seen_s_ago", "incarnation", "generation", "version", "pages", "fill_pages", "tiers")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SHARD_UUID_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    LAST_SEEN_S_AGO_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    PAGES_FIELD_NUMBER: _ClassVar[int]
    FILL_PAGES_FIELD_NUMBER: _ClassVar[int]
    TIERS_FIELD_NUMBER: _ClassVar[int]
    name: str
    shard_uuid: str
    address: str
    state: str
    last_seen_s_ago: float
    incarnation: int
    generation: int
    version: str
    pages: int
    fill_pages: int
    tiers: _containers.RepeatedCompositeFieldContainer[_common_pb2.TierUsage]
    def __init__(self, name: _Optional[str] = ..., shard_uuid: _Optional[str] = ..., address: _Optional[str] = ..., state: _Optional[str] = ..., last_seen_s_ago: _Optional[float] = ..., incarnation: _Optional[int] = ..., generation: _Optional[int] = ..., version: _Optional[str] = ..., pages: _Optional[int] = ..., fill_pages: _Optional[int] = ..., tiers: _Optional[_Iterable[_Union[_common_pb2.TierUsage, _Mapping]]] = ...) -> None: ...

class TierInfo(_message.Message):
    __slots__ = ("tier", "granted_bytes", "reserved_bytes", "usage")
    TIER_FIELD_NUMBER: _ClassVar[int]
    GRANTED_BYTES_FIELD_NUMBER: _ClassVar[int]
    RESERVED_BYTES_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    tier: _common_pb2.Tier
    granted_bytes: int
    reserved_bytes: int
    usage: _common_pb2.TierUsage
    def __init__(self, tier: _Optional[_Union[_common_pb2.Tier, _Mapping]] = ..., granted_bytes: _Optional[int] = ..., reserved_bytes: _Optional[int] = ..., usage: _Optional[_Union[_common_pb2.TierUsage, _Mapping]] = ...) -> None: ...

class Stranger(_message.Message):
    __slots__ = ("tier", "prefix", "segments", "bytes")
    TIER_FIELD_NUMBER: _ClassVar[int]
    PREFIX_FIELD_NUMBER: _ClassVar[int]
    SEGMENTS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    tier: str
    prefix: str
    segments: int
    bytes: int
    def __init__(self, tier: _Optional[str] = ..., prefix: _Optional[str] = ..., segments: _Optional[int] = ..., bytes: _Optional[int] = ...) -> None: ...

class AddTierRequest(_message.Message):
    __slots__ = ("spec",)
    SPEC_FIELD_NUMBER: _ClassVar[int]
    spec: _common_pb2.TierSpec
    def __init__(self, spec: _Optional[_Union[_common_pb2.TierSpec, _Mapping]] = ...) -> None: ...

class SetTierRequest(_message.Message):
    __slots__ = ("name", "capacity_bytes", "rank", "high", "low", "replace", "replace_by", "force")
    NAME_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_BYTES_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    HIGH_FIELD_NUMBER: _ClassVar[int]
    LOW_FIELD_NUMBER: _ClassVar[int]
    REPLACE_FIELD_NUMBER: _ClassVar[int]
    REPLACE_BY_FIELD_NUMBER: _ClassVar[int]
    FORCE_FIELD_NUMBER: _ClassVar[int]
    name: str
    capacity_bytes: int
    rank: int
    high: float
    low: float
    replace: str
    replace_by: str
    force: bool
    def __init__(self, name: _Optional[str] = ..., capacity_bytes: _Optional[int] = ..., rank: _Optional[int] = ..., high: _Optional[float] = ..., low: _Optional[float] = ..., replace: _Optional[str] = ..., replace_by: _Optional[str] = ..., force: _Optional[bool] = ...) -> None: ...

class RemoveTierRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class RemoveTierReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ActivateTierRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class ForgetNodeRequest(_message.Message):
    __slots__ = ("node",)
    NODE_FIELD_NUMBER: _ClassVar[int]
    node: str
    def __init__(self, node: _Optional[str] = ...) -> None: ...

class ForgetNodeReply(_message.Message):
    __slots__ = ("segments_deleted", "bytes_deleted", "pending_tiers")
    SEGMENTS_DELETED_FIELD_NUMBER: _ClassVar[int]
    BYTES_DELETED_FIELD_NUMBER: _ClassVar[int]
    PENDING_TIERS_FIELD_NUMBER: _ClassVar[int]
    segments_deleted: int
    bytes_deleted: int
    pending_tiers: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, segments_deleted: _Optional[int] = ..., bytes_deleted: _Optional[int] = ..., pending_tiers: _Optional[_Iterable[str]] = ...) -> None: ...

class JobSpec(_message.Message):
    __slots__ = ("kind", "tier", "destination", "byte_budget", "older_than_s", "target_utilisation", "rate_bytes_s", "lost")
    KIND_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    DESTINATION_FIELD_NUMBER: _ClassVar[int]
    BYTE_BUDGET_FIELD_NUMBER: _ClassVar[int]
    OLDER_THAN_S_FIELD_NUMBER: _ClassVar[int]
    TARGET_UTILISATION_FIELD_NUMBER: _ClassVar[int]
    RATE_BYTES_S_FIELD_NUMBER: _ClassVar[int]
    LOST_FIELD_NUMBER: _ClassVar[int]
    kind: MoveKind
    tier: str
    destination: str
    byte_budget: int
    older_than_s: float
    target_utilisation: float
    rate_bytes_s: int
    lost: bool
    def __init__(self, kind: _Optional[_Union[MoveKind, str]] = ..., tier: _Optional[str] = ..., destination: _Optional[str] = ..., byte_budget: _Optional[int] = ..., older_than_s: _Optional[float] = ..., target_utilisation: _Optional[float] = ..., rate_bytes_s: _Optional[int] = ..., lost: _Optional[bool] = ...) -> None: ...

class StartJobRequest(_message.Message):
    __slots__ = ("spec", "dry_run")
    SPEC_FIELD_NUMBER: _ClassVar[int]
    DRY_RUN_FIELD_NUMBER: _ClassVar[int]
    spec: JobSpec
    dry_run: bool
    def __init__(self, spec: _Optional[_Union[JobSpec, _Mapping]] = ..., dry_run: _Optional[bool] = ...) -> None: ...

class Job(_message.Message):
    __slots__ = ("id", "spec", "state", "reason", "pages_moved", "bytes_moved", "logical_bytes_moved", "bytes_total", "bytes_left", "pages_left", "rate_bytes_s", "eta_s", "created_at", "ended_at", "nodes", "automatic", "room_bytes", "pages_lost")
    class RoomBytesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    ID_FIELD_NUMBER: _ClassVar[int]
    SPEC_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    PAGES_MOVED_FIELD_NUMBER: _ClassVar[int]
    BYTES_MOVED_FIELD_NUMBER: _ClassVar[int]
    LOGICAL_BYTES_MOVED_FIELD_NUMBER: _ClassVar[int]
    BYTES_TOTAL_FIELD_NUMBER: _ClassVar[int]
    BYTES_LEFT_FIELD_NUMBER: _ClassVar[int]
    PAGES_LEFT_FIELD_NUMBER: _ClassVar[int]
    RATE_BYTES_S_FIELD_NUMBER: _ClassVar[int]
    ETA_S_FIELD_NUMBER: _ClassVar[int]
    CREATED_AT_FIELD_NUMBER: _ClassVar[int]
    ENDED_AT_FIELD_NUMBER: _ClassVar[int]
    NODES_FIELD_NUMBER: _ClassVar[int]
    AUTOMATIC_FIELD_NUMBER: _ClassVar[int]
    ROOM_BYTES_FIELD_NUMBER: _ClassVar[int]
    PAGES_LOST_FIELD_NUMBER: _ClassVar[int]
    id: str
    spec: JobSpec
    state: JobState
    reason: str
    pages_moved: int
    bytes_moved: int
    logical_bytes_moved: int
    bytes_total: int
    bytes_left: int
    pages_left: int
    rate_bytes_s: float
    eta_s: float
    created_at: float
    ended_at: float
    nodes: _containers.RepeatedCompositeFieldContainer[JobNode]
    automatic: bool
    room_bytes: _containers.ScalarMap[str, int]
    pages_lost: int
    def __init__(self, id: _Optional[str] = ..., spec: _Optional[_Union[JobSpec, _Mapping]] = ..., state: _Optional[_Union[JobState, str]] = ..., reason: _Optional[str] = ..., pages_moved: _Optional[int] = ..., bytes_moved: _Optional[int] = ..., logical_bytes_moved: _Optional[int] = ..., bytes_total: _Optional[int] = ..., bytes_left: _Optional[int] = ..., pages_left: _Optional[int] = ..., rate_bytes_s: _Optional[float] = ..., eta_s: _Optional[float] = ..., created_at: _Optional[float] = ..., ended_at: _Optional[float] = ..., nodes: _Optional[_Iterable[_Union[JobNode, _Mapping]]] = ..., automatic: _Optional[bool] = ..., room_bytes: _Optional[_Mapping[str, int]] = ..., pages_lost: _Optional[int] = ...) -> None: ...

class JobNode(_message.Message):
    __slots__ = ("node", "state", "reason", "pages_moved", "bytes_moved", "bytes_left", "pages_left")
    NODE_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    PAGES_MOVED_FIELD_NUMBER: _ClassVar[int]
    BYTES_MOVED_FIELD_NUMBER: _ClassVar[int]
    BYTES_LEFT_FIELD_NUMBER: _ClassVar[int]
    PAGES_LEFT_FIELD_NUMBER: _ClassVar[int]
    node: str
    state: str
    reason: str
    pages_moved: int
    bytes_moved: int
    bytes_left: int
    pages_left: int
    def __init__(self, node: _Optional[str] = ..., state: _Optional[str] = ..., reason: _Optional[str] = ..., pages_moved: _Optional[int] = ..., bytes_moved: _Optional[int] = ..., bytes_left: _Optional[int] = ..., pages_left: _Optional[int] = ...) -> None: ...

class ListJobsRequest(_message.Message):
    __slots__ = ("all",)
    ALL_FIELD_NUMBER: _ClassVar[int]
    all: bool
    def __init__(self, all: _Optional[bool] = ...) -> None: ...

class ListJobsReply(_message.Message):
    __slots__ = ("jobs",)
    JOBS_FIELD_NUMBER: _ClassVar[int]
    jobs: _containers.RepeatedCompositeFieldContainer[Job]
    def __init__(self, jobs: _Optional[_Iterable[_Union[Job, _Mapping]]] = ...) -> None: ...

class WatchJobRequest(_message.Message):
    __slots__ = ("id",)
    ID_FIELD_NUMBER: _ClassVar[int]
    id: str
    def __init__(self, id: _Optional[str] = ...) -> None: ...

class CancelJobRequest(_message.Message):
    __slots__ = ("id",)
    ID_FIELD_NUMBER: _ClassVar[int]
    id: str
    def __init__(self, id: _Optional[str] = ...) -> None: ...
