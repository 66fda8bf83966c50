"""Spans of messages that a process has read or stored: found by their headers, made once all is done."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator, Sequence

from engine.broker.jetstream import Outgoing
from engine.channels.channel import Job
from engine.partition.worker import Delivered
from engine.traces import names
from engine.traces.contexts import context_of, followed, followed_in
from engine.traces.lines import about
from engine.traces.spans import Spans, failed
from seamark.protocol.subjects import encode_token


def jobs_stored(spans: Spans, stored: Iterable[tuple[str | None, int, Sequence[Outgoing]]], since: int) -> None:
    """Jobs are stored, in a batch whose storing was begun at `since` (Unix nanoseconds).

    Args:
        stored: of each record that jobs follow from its `traceparent`, when it was stored (Unix nanoseconds), and the jobs.
    """
    for traceparent, stored_at, jobs in stored:
        origin = followed(traceparent)
        if origin is not None and spans.room(jobs[0].subject.split(".", 4)[3]):  # the tenant of `names.JOB`
            about = {names.MESSAGE_COUNT: len(jobs)}
            spans.begin(names.STORE_JOB, origin, about, since=since, stored_at=stored_at).end()


def receipts_stored(spans: Spans, receipts: Sequence[Outgoing], since: int, *, stored_at: int | None = None) -> None:
    """These receipts are stored, in a batch whose storing was begun at `since` (Unix nanoseconds).

    Args:
        stored_at: since when that is stored which they are about, in Unix nanoseconds; None: just now.
    """
    about = {names.MESSAGE_COUNT: len(receipts)}
    for receipt in receipts:
        origin = followed_in(b"\r\n" + receipt.headers) if receipt.headers else None
        if origin is not None and spans.room(receipt.subject.split(".", 3)[2]):  # the tenant of `names.RECEIPT`
            spans.begin(names.STORE_RECEIPT, origin, about, since=since, stored_at=stored_at).end()


def job_dead(spans: Spans, job: Job, reason: str) -> None:
    """The dead letter of a job is stored, whoever follows its notification. `reason`: the class of the letter."""
    about = {names.CHANNEL: job.channel, names.OUTCOME: "dead"}
    stored_at = int((job.stored_at or job.first_at).timestamp() * 1e9)
    spans.error(names.BURY, context_of(job.trace), reason, about, tenant=encode_token(job.tenant), stored_at=stored_at)


@contextlib.contextmanager
def working(spans: Spans, hop: names.Hop, consumer: str, epoch: str, batch: Sequence[Delivered]) -> Iterator[None]:
    """The spans of what is done with a batch out of a LOG or RECEIPTS, as long as the block runs: one of each followed message.

    Lines of the log belong to a message if it is the only one.

    Args:
        consumer: the durable that reads them.
        epoch: the incarnation of their stream.
    """
    since = time.time_ns()
    error = ""
    try:
        with about(followed_in(batch[0].headers) if len(batch) == 1 else None):
            yield
    except Exception as raised:
        error = type(raised).__name__
        raise
    finally:
        for message in batch:
            origin = followed_in(message.headers)
            if origin is not None and spans.room(message.subject.split(b".", 3)[2].decode("utf-8", "replace")):
                said: dict[str, str | int] = {
                    names.GROUP: consumer,
                    names.MESSAGE_ID: f"{epoch}.{message.seq}",
                    names.MESSAGE_COUNT: len(batch),
                }
                span = spans.begin(hop, origin, said, since=since, stored_at=message.time_nanoseconds)
                if error:
                    failed(span, error)
                span.end()
