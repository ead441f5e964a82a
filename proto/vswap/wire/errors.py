"""The errors of vswap, split by what the caller does next.

One base class, fields rather than prose. Every class is in the two tables at the end: the gRPC
status it travels as, and the errno an NBD client sees. ``tests/unit/test_errors.py`` holds both
tables complete.
"""

from __future__ import annotations

import errno
import json
from typing import Any, ClassVar

import grpc

_SHOWN_SLOTS = 64


class VswapError(Exception):
    """Base of all errors that vswap raises on purpose.

    ``fields`` are JSON-serialisable and travel over the wire with the message, so a client gets
    the same class with the same fields back.
    """

    action: ClassVar[str] = "report"
    """What the caller should do: ``report``, ``retry``, ``wait``, ``reconnect`` or ``fix``."""

    def __init__(self, message: str, **fields: Any) -> None:
        super().__init__(message)
        self.message = message
        slots = fields.get("slots")
        if slots is not None:
            slots = [int(slot) for slot in slots]
            fields["slots"] = slots[:_SHOWN_SLOTS]
            fields.setdefault("slots_count", len(slots))
        self.fields = fields

    def __str__(self) -> str:
        return self.message

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.message, self.fields)

    @property
    def fields_json(self) -> str:
        return json.dumps(self.fields, default=str)


def _rebuild(kind: type[VswapError], message: str, fields: dict[str, Any]) -> VswapError:
    return kind(message, **fields)


# ------------------------------------------------------------------ about pages


class SlotNotFound(VswapError):
    """Never stored, or freed. Fields: space, slots."""


class PageLost(VswapError):
    """The bytes are gone: the segment is missing from its backend. Fields: space, slots, tier."""


class PageCorrupt(VswapError):
    """The bytes fail their check; they are never returned. Fields: space, slots, tier."""


# ------------------------------------------------------------------ about room


class SpaceFull(VswapError):
    """A quota of the space would be exceeded; nothing was written. Fields: space, need, room."""

    action = "wait"


class OutOfTiers(VswapError):
    """No allowed tier has room; nothing was written. Fields: space, need, tiers."""

    action = "wait"


# ------------------------------------------------------------------ about the other side


class TierUnavailable(VswapError):
    """The backend cannot be reached or refuses; nothing happened. Fields: tier."""

    action = "retry"


class Unreachable(VswapError):
    """A vswap process cannot be reached; nothing happened. Fields: address."""

    action = "retry"


class OutcomeUnknown(VswapError):
    """It may have happened: the reply was lost or late. Repeat it, repeating is safe."""

    action = "retry"


class StaleIncarnation(VswapError):
    """The other side has moved on (restart, newer request, expired token)."""

    action = "reconnect"


# ------------------------------------------------------------------ about the request


class InvalidRequest(VswapError):
    """Base of nonsense requests; nothing was done."""

    action = "fix"


class PageSizeMismatch(InvalidRequest):
    """The page bytes do not fit the slots and the space's page size. Fields: expected, got."""


class SlotOutOfRange(InvalidRequest):
    """A slot is not below the space's maximum. Fields: space, slots, max_slots."""


class DuplicateSlots(InvalidRequest):
    """A slot occurs twice in one client batch. Fields: space, slots."""


class BatchTooLarge(InvalidRequest):
    """A batch exceeds the message limit. Fields: got, limit (bytes of pages)."""


class UnknownSpace(InvalidRequest):
    """Fields: space."""


class UnknownTier(InvalidRequest):
    """Fields: tier."""


class UnknownNode(InvalidRequest):
    """Fields: node."""


class UnknownJob(InvalidRequest):
    """Fields: job."""


class BadConfig(InvalidRequest):
    """A configuration value is wrong; the message names its file and key. Fields: source, key."""


class AlreadyExists(InvalidRequest):
    """The name is taken. Fields: name."""


class Refused(VswapError):
    """Understood, but it cannot be done now, with the figures why. Fields vary."""

    action = "report"


class SegmentExists(Refused):
    """A backend holds a segment of that name already; it was left alone. Fields: name."""


class BackendRefused(Refused):
    """The backend is unfit (a Redis that evicts, no capacity, not writable). Fields: tier."""


class StateInUse(Refused):
    """The state directory belongs to a running process. Fields: path, pid."""


class StateInvalid(Refused):
    """State on disk is damaged or of another version; never half-read. Fields: path."""


class InternalError(VswapError):
    """A defect of vswap: please report it."""


GRPC_STATUS: dict[type[VswapError], grpc.StatusCode] = {
    SlotNotFound: grpc.StatusCode.NOT_FOUND,
    PageLost: grpc.StatusCode.DATA_LOSS,
    PageCorrupt: grpc.StatusCode.DATA_LOSS,
    SpaceFull: grpc.StatusCode.RESOURCE_EXHAUSTED,
    OutOfTiers: grpc.StatusCode.RESOURCE_EXHAUSTED,
    TierUnavailable: grpc.StatusCode.UNAVAILABLE,
    Unreachable: grpc.StatusCode.UNAVAILABLE,
    OutcomeUnknown: grpc.StatusCode.DEADLINE_EXCEEDED,
    StaleIncarnation: grpc.StatusCode.ABORTED,
    InvalidRequest: grpc.StatusCode.INVALID_ARGUMENT,
    PageSizeMismatch: grpc.StatusCode.INVALID_ARGUMENT,
    SlotOutOfRange: grpc.StatusCode.OUT_OF_RANGE,
    DuplicateSlots: grpc.StatusCode.INVALID_ARGUMENT,
    BatchTooLarge: grpc.StatusCode.INVALID_ARGUMENT,
    UnknownSpace: grpc.StatusCode.NOT_FOUND,
    UnknownTier: grpc.StatusCode.NOT_FOUND,
    UnknownNode: grpc.StatusCode.NOT_FOUND,
    UnknownJob: grpc.StatusCode.NOT_FOUND,
    BadConfig: grpc.StatusCode.INVALID_ARGUMENT,
    AlreadyExists: grpc.StatusCode.ALREADY_EXISTS,
    Refused: grpc.StatusCode.FAILED_PRECONDITION,
    SegmentExists: grpc.StatusCode.ALREADY_EXISTS,
    BackendRefused: grpc.StatusCode.FAILED_PRECONDITION,
    StateInUse: grpc.StatusCode.FAILED_PRECONDITION,
    StateInvalid: grpc.StatusCode.FAILED_PRECONDITION,
    InternalError: grpc.StatusCode.INTERNAL,
}

# The NBD protocol knows EPERM, EIO, ENOMEM, EINVAL, ENOSPC, EOVERFLOW, ENOTSUP and ESHUTDOWN.
NBD_ERRNO: dict[type[VswapError], int] = {
    SlotNotFound: errno.EIO,
    PageLost: errno.EIO,
    PageCorrupt: errno.EIO,
    SpaceFull: errno.ENOSPC,
    OutOfTiers: errno.ENOSPC,
    TierUnavailable: errno.EIO,
    Unreachable: errno.EIO,
    OutcomeUnknown: errno.EIO,
    StaleIncarnation: errno.ESHUTDOWN,
    InvalidRequest: errno.EINVAL,
    PageSizeMismatch: errno.EINVAL,
    SlotOutOfRange: errno.EINVAL,
    DuplicateSlots: errno.EINVAL,
    BatchTooLarge: errno.EOVERFLOW,
    UnknownSpace: errno.ESHUTDOWN,  # An export that was deleted while it was in use.
    UnknownTier: errno.EINVAL,
    UnknownNode: errno.EINVAL,
    UnknownJob: errno.EINVAL,
    BadConfig: errno.EINVAL,
    AlreadyExists: errno.EINVAL,
    Refused: errno.EPERM,
    SegmentExists: errno.EIO,
    BackendRefused: errno.EIO,  # A disk whose pages are out of reach; nobody's rights.
    StateInUse: errno.EPERM,
    StateInvalid: errno.EIO,
    InternalError: errno.EIO,
}
