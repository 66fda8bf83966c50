"""The spans of hops, as OpenTelemetry's exporters read them, and nothing beside that.

The SDK's own span has a lock, looks at the type of each attribute and copies what it is given, since anybody may give it
anything. What hops say is known beforehand (`engine.traces.names`), and one task works on each.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Link, Span, SpanContext, SpanKind, Status, StatusCode

from engine.traces.contexts import SAMPLED
from engine.traces.names import Hop
from engine.traces.spans import Attributes


class HopSpan(ReadableSpan, Span):
    """A span that is followed. When it ends it is handed over, once.

    It leans on private parts of `ReadableSpan`: `_name`, `_status` and `_end_time` are its fields, and it keeps the dictionary of
    attributes and the list of links that it is given, without copying them.
    """

    def __init__(
        self,
        name: str,
        context: SpanContext,
        parent: SpanContext | None,
        resource: Resource,
        scope: InstrumentationScope,
        kind: SpanKind,
        attributes: dict[str, Any],
        links: list[Link],
        since: int,
        ended: Callable[[ReadableSpan], None],
    ) -> None:
        super().__init__(
            name, context, parent, resource, attributes, (), links, kind,
            start_time=since, instrumentation_scope=scope,
        )  # fmt: skip
        self._at, self._said, self._linked, self._ended = context, attributes, links, ended

    def get_span_context(self) -> SpanContext:
        """Where it stands."""
        return self._at

    def end(self, end_time: int | None = None) -> None:
        """It is over, now or at `end_time` (Unix nanoseconds)."""
        if self._end_time is None:
            self._end_time = time.time_ns() if end_time is None else end_time
            self._ended(self)

    def is_recording(self) -> bool:
        """Until it has ended."""
        return self._end_time is None

    def set_attribute(self, key: str, value: Any) -> None:
        """Say one more thing."""
        self._said[key] = value

    def set_attributes(self, attributes: Mapping[str, Any]) -> None:
        """Say more things."""
        self._said.update(attributes)

    def add_link(self, context: SpanContext, attributes: Any = None) -> None:
        """It has to do with another one, too."""
        self._linked.append(Link(context, attributes))

    def set_status(self, status: Status | StatusCode, description: str | None = None) -> None:
        """How it went."""
        self._status = status if isinstance(status, Status) else Status(status, description)

    def update_name(self, name: str) -> None:
        """Call it otherwise."""
        self._name = name

    def add_event(self, name: str, attributes: Any = None, timestamp: int | None = None) -> None:
        """Hops have no events: what could be in them is not looked through for personal data."""

    def record_exception(
        self, exception: BaseException, attributes: Any = None, timestamp: int | None = None, escaped: bool = False
    ) -> None:
        """Nothing is taken of an exception: its message may hold personal data."""


class HopSpans:
    """Makes the spans of a process.

    Args:
        resource: what tells the process from others.
        ended: takes each span that has ended, such as the `on_end` of a processor.
    """

    def __init__(self, resource: Resource, ended: Callable[[ReadableSpan], None]) -> None:
        self._resource = resource
        self._ended = ended
        self._scope = InstrumentationScope("seamark")
        self._said: dict[Hop, tuple[str, dict[str, str]]] = {}

    def begin(
        self,
        hop: Hop,
        parent: SpanContext | None,
        links: Iterable[SpanContext],
        attributes: Attributes,
        since: int | None,
        first: SpanContext | None = None,
    ) -> Span:
        """The span of a hop, below `parent`; without one it begins a trace.

        Args:
            links: other contexts that it has to do with.
            since: when it began, in Unix nanoseconds; None: now.
            first: the ids that a trace begins with, where they were found for it; a span id of 0: a random one.
        """
        known = self._said.get(hop)
        if known is None:
            known = self._said[hop] = hop.title, hop.attributes
        title, said = known
        origin = parent or first
        context = SpanContext(
            _random(128) if origin is None else origin.trace_id,
            (0 if first is None else first.span_id) or _random(64),
            is_remote=False,
            trace_flags=SAMPLED,
            trace_state=None if parent is None else parent.trace_state,
        )
        return HopSpan(
            title, context, parent, self._resource, self._scope, hop.kind, {**said, **attributes},
            [Link(one) for one in links], time.time_ns() if since is None else since, self._ended,
        )  # fmt: skip


def _random(bits: int) -> int:
    return random.getrandbits(bits) or 1  # 0 is no id
