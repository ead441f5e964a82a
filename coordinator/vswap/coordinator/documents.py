"""The durable part of the state as small JSON documents, and back.

Format version 2 (1 was SQLite). A document that does not fit makes the whole state invalid: it is
never half-read.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from vswap.coordinator.state import Hold, Job, Key, Shard, State, Tier
from vswap.wire.errors import StateInvalid

FORMAT_VERSION = 2

T = TypeVar("T")

_TIER = TypeAdapter(Tier)
_SHARD = TypeAdapter(Shard)
_HOLD = TypeAdapter(Hold)
_JOB = TypeAdapter(Job)


def document(state: State, key: Key) -> dict[str, Any] | None:
    """The document of that name as it is now; None if there is none (any more)."""
    match key:
        case ("generation",):
            return {"generation": state.generation}
        case ("cluster",):
            return {"uuid": state.cluster}
        case ("tier", name):
            tier = state.tiers.get(name)
            return None if tier is None else _TIER.dump_python(tier, mode="json")
        case ("shard", uuid):
            return _plain(state.shards.get(uuid))
        case ("hold", uuid, name):
            return _plain(state.holds.get((uuid, name)))
        case ("job", job_id):
            job = state.jobs.get(job_id)
            return None if job is None else _JOB.dump_python(job, mode="json")
        case ("sweep", uuid, name):
            return {} if (uuid, name) in state.sweeps else None
    raise ValueError(f"no document is called {key}")


def restore(documents: Iterable[tuple[Key, dict[str, Any]]], path: str) -> State:
    """The state those documents describe. Raises StateInvalid naming ``path``."""
    state = State(cluster="")
    for key, body in documents:
        try:
            _put(state, key, body)
        except (ValidationError, ValueError, KeyError, TypeError) as error:
            reason = str(error).splitlines()[0]
            raise StateInvalid(
                f"{path}: document {'/'.join(key)} is damaged ({reason}); "
                "restore the file from a copy",
                path=path,
            ) from error
    if not state.cluster:
        raise StateInvalid(f"{path} names no cluster; restore the file from a copy", path=path)
    return state


def _put(state: State, key: Key, body: dict[str, Any]) -> None:
    match key:
        case ("generation",):
            state.generation = int(body["generation"])
        case ("cluster",):
            state.cluster = str(body["uuid"])
        case ("tier", name):
            state.tiers[name] = _TIER.validate_python(body)
        case ("shard", uuid):
            state.shards[uuid] = _SHARD.validate_python(body)
        case ("hold", uuid, name):
            state.holds[uuid, name] = _HOLD.validate_python(body)
        case ("job", job_id):
            state.jobs[job_id] = _JOB.validate_python(body)
        case ("sweep", uuid, name):
            state.sweeps.add((uuid, name))
        case _:
            raise ValueError("unknown kind of document")


def _plain(record: Shard | Hold | None) -> dict[str, Any] | None:
    return None if record is None else asdict(record)
