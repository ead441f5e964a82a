"""The exit codes of the `vswap` command, in one table."""

from __future__ import annotations

from vswap.wire import errors

OK = 0
INTERNAL = 1
USAGE = 2
REFUSED = 3
UNREACHABLE = 4
INTEGRITY = 5
INTERRUPTED = 130

MEANINGS: dict[int, str] = {
    OK: "done",
    INTERNAL: "internal error, or a job that failed or was cancelled",
    USAGE: "wrong usage or configuration, or a name that does not exist",
    REFUSED: "refused: no room, a quota, or not allowed in this state",
    UNREACHABLE: "a process or backend could not be reached or did not answer",
    INTEGRITY: "a page was lost, corrupt or wrong",
    INTERRUPTED: "Ctrl-C; a job that was watched goes on",
}

CODES: dict[type[errors.VswapError], int] = {
    errors.SlotNotFound: USAGE,
    errors.PageLost: INTEGRITY,
    errors.PageCorrupt: INTEGRITY,
    errors.SpaceFull: REFUSED,
    errors.OutOfTiers: REFUSED,
    errors.TierUnavailable: UNREACHABLE,
    errors.Unreachable: UNREACHABLE,
    errors.OutcomeUnknown: UNREACHABLE,
    errors.StaleIncarnation: REFUSED,
    errors.InvalidRequest: USAGE,
    errors.PageSizeMismatch: USAGE,
    errors.SlotOutOfRange: USAGE,
    errors.DuplicateSlots: USAGE,
    errors.BatchTooLarge: USAGE,
    errors.UnknownSpace: USAGE,
    errors.UnknownTier: USAGE,
    errors.UnknownNode: USAGE,
    errors.UnknownJob: USAGE,
    errors.BadConfig: USAGE,
    errors.AlreadyExists: REFUSED,
    errors.Refused: REFUSED,
    errors.SegmentExists: INTERNAL,
    errors.BackendRefused: REFUSED,
    errors.StateInUse: REFUSED,
    errors.StateInvalid: REFUSED,
    errors.InternalError: INTERNAL,
}


def exit_code(error: BaseException) -> int:
    """The exit code an error stands for; every class of `vswap.wire.errors` is in the table."""
    return CODES.get(type(error), INTERNAL) if isinstance(error, errors.VswapError) else INTERNAL


def help_text() -> str:
    """The table as help text."""
    return "Exit codes: " + "; ".join(f"{code} {text}" for code, text in MEANINGS.items())
