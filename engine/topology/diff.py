"""How a configuration in a file and one on the server compare, and what a difference would mean for stored messages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final, Literal, NamedTuple

Kind = Literal["stream", "consumer"]

_DEFAULTS: Final[Mapping[Kind, Mapping[str, Any]]] = {
    "stream": {"retention": "limits", "storage": "file", "discard": "old", "num_replicas": 1, "compression": "none"}
    | {"max_bytes": -1, "max_msgs": -1, "max_msgs_per_subject": -1, "max_msg_size": -1, "max_consumers": -1}
    | {"duplicate_window": 120_000_000_000},
    "consumer": {"deliver_policy": "all", "ack_policy": "none", "replay_policy": "instant"}
    | {"max_deliver": -1, "max_waiting": 512},
}
"""What a server puts in for a field that is left out, and for a 0 where it has -1; all others are zero, false or empty."""

_FIXED: Final[Mapping[Kind, frozenset[str]]] = {
    "stream": frozenset({"name", "storage", "mirror", "sealed", "first_seq", "persist_mode", "allow_msg_counter"})
    | {"template_owner"},
    "consumer": frozenset({"name", "durable_name", "deliver_policy", "opt_start_seq", "opt_start_time", "ack_policy"})
    | {"replay_policy", "max_waiting", "mem_storage", "flow_control", "idle_heartbeat", "deliver_subject"},
}
"""What the server refuses to change in place (10052 for streams, 10012 for consumers)."""

_ONE_WAY: Final = frozenset({"deny_delete", "deny_purge", "allow_msg_ttl", "allow_msg_schedules"})
"""Switches of a stream that can be turned on but never off again."""


class Change(NamedTuple):
    """One field that differs."""

    field: str
    server: Any
    file: Any

    def __str__(self) -> str:
        return f"{self.field} {_shown(self.server)} -> {_shown(self.file)}"


def _shown(value: Any) -> str:
    return "unset" if value in (None, "", [], {}) else str(value)


def changes_between(kind: Kind, file: Mapping[str, Any], server: Mapping[str, Any]) -> Iterator[Change]:
    """The fields in which the server's configuration is not what the file says.

    A field that one side leaves out counts with the server's default. Of the metadata only what the file names counts:
    the server and operators keep notes of their own there.
    """
    for key in sorted((file.keys() | server.keys()) - {"metadata"}):
        wanted, has = (config.get(key) or _DEFAULTS[kind].get(key) or None for config in (file, server))
        if wanted != has:
            yield Change(key, has, wanted)
    notes = server.get("metadata") or {}
    for key, value in sorted((file.get("metadata") or {}).items()):
        if notes.get(key) != value:
            yield Change(f"metadata {key}", notes.get(key), value)


def unchangeable(kind: Kind, change: Change) -> bool:
    """Whether the server would refuse this change on an existing stream or consumer."""
    if change.field in _FIXED[kind]:
        return True
    if kind == "stream" and change.field in _ONE_WAY:
        return not change.file
    return change.field == "retention" and "workqueue" in (change.server, change.file)


def lost_by(change: Change, messages: int, size_bytes: int, oldest_age_seconds: float) -> str | None:
    """What a change would do to messages already stored, or None when it does them no harm."""
    field, has, wanted = change
    if field == "max_age" and wanted and wanted / 1e9 < oldest_age_seconds:
        return f"drop messages older than {wanted / 1e9:.0f} s"
    if field == "max_bytes" and 0 <= wanted < size_bytes:
        return f"leave it full at once: {size_bytes} bytes are stored"
    if field == "max_msgs" and 0 <= wanted < messages:
        return f"drop messages: {messages} are stored"
    if field == "max_msgs_per_subject" and messages and wanted >= 0 and (has < 0 or wanted < has):
        return "drop the older messages of every subject"
    if field == "discard" and wanted == "old":
        return "let a full stream drop what it has accepted"
    if field == "num_replicas" and wanted < has:
        return f"keep what was accepted with {has} copies on {wanted}"
    if field == "subject_transform" and messages:
        return "leave stored messages under subjects nobody reads"
    return None
