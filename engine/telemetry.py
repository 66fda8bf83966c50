"""Logs: one stable word per happening, facts as fields, never a payload, token, address or user."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sys
from collections.abc import MutableMapping
from importlib import metadata
from typing import IO, Any, Literal, cast

import structlog
from opentelemetry import trace

from engine.traces.lines import current

REDACTED_KEYS = frozenset({"token", "password", "secret", "authorization", "payload", "data", "email", "phone"})
"""Keys that never reach a log, whoever passes them."""


class Output:
    """A file that never fails its writer: where a disk is full or a reader has gone, lines are lost and nothing else.

    It writes past Python's own buffer: what waits in there would be tried again at the end of the process, and fail it.

    Args:
        file: what is behind it; None, as `sys.stdout` is for a process that was started without: every line is lost.
    """

    def __init__(self, file: IO[str] | None) -> None:
        self._descriptor = None if file is None else file.fileno()

    def write(self, text: str) -> int:
        """Write at once, or lose it."""
        left = text.encode("utf-8", "backslashreplace")
        with contextlib.suppress(OSError):
            while left and self._descriptor is not None:
                left = left[os.write(self._descriptor, left) :]
        return len(text)

    def flush(self) -> None:
        """Nothing waits."""


def identity_of(role: str) -> dict[str, str]:
    """What tells this process from others, in traces, metrics and logs alike: OpenTelemetry's resource attributes."""
    try:
        version = metadata.version("seamark-server")
    except metadata.PackageNotFoundError:  # run from a folder that was never installed
        version = "unknown"
    return {
        "service.namespace": "seamark",
        "service.name": f"seamark-{role}",
        "service.instance.id": f"{socket.gethostname()}-{os.getpid()}",
        "service.version": version,
    }


def configure_logging(role: str, format: Literal["json", "console"] = "json", level: str = "INFO") -> None:
    """Send logs of this process to standard output, as JSON lines or for people; standard `logging` goes the same way.

    A line that cannot be written is lost: a full disk must not end a role that could do without it.
    """
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _name_trace,
        _redact,
    ]
    drawn = _rendering(format)
    output = cast("Any", Output(sys.stdout))
    structlog.configure(
        processors=[*shared, structlog.processors.StackInfoRenderer(), *drawn],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelName(level)),
        logger_factory=structlog.WriteLoggerFactory(file=output),
        cache_logger_on_first_use=True,
    )
    identity = identity_of(role)
    structlog.contextvars.bind_contextvars(
        role=role,
        service=identity["service.name"],
        instance=identity["service.instance.id"],
        version=identity["service.version"],
    )
    handler = logging.StreamHandler(output)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *drawn], foreign_pre_chain=shared
        )
    )
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)


def _rendering(format: str) -> list[Any]:
    """The last steps of a line: tracebacks as data for machines; the console renderer draws its own."""
    # Both without local variables: they hold payloads and tokens.
    if format == "console":
        return [structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)]
    tracebacks = structlog.tracebacks.ExceptionDictTransformer(show_locals=False)
    return [structlog.processors.ExceptionRenderer(tracebacks), structlog.processors.JSONRenderer()]


def _name_trace(logger: Any, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Name the trace that a line belongs to, where one is followed: that of a notification, else that of a request."""
    context = current() or trace.get_current_span().get_span_context()
    if context.is_valid and context.trace_flags.sampled:
        event.setdefault("trace_id", f"{context.trace_id:032x}")
        event.setdefault("span_id", f"{context.span_id:016x}")
    return event


def _redact(logger: Any, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    for key in REDACTED_KEYS & event.keys():
        event[key] = "***"
    return event
