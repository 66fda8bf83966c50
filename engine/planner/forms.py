"""Notifications that are alike are decided about once: what is written down of them differs only in what each has of its own.

A form is made from the receipt and the jobs of a notification that has placeholders for all that is its own. Filled in with what
another notification has there, it is byte for byte what would have been made of that one. That holds only for decisions that do
not depend on a moment or a name: who waits for quiet hours to end has his own turn, and a job that is due later has its own name.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta
from operator import itemgetter
from typing import Any, Final, NamedTuple

import msgspec

from engine.broker.jetstream import Outgoing
from engine.plan.decide import has_moments
from engine.plan.decisions import Decision, Inputs
from engine.planner.plans import INPUTS_BYTES_MAX, Due, Found, encode, receipt_message

_SECRET: Final = secrets.token_hex(8)
"""It is part of each placeholder: so nobody can write one into a notification."""

_WORDS: Final = tuple(f"{word}-{_SECRET}" for word in ("id", "user", "trace", "key", "data"))
_ID, _USER, _TRACE, _COLLAPSE_KEY, _DATA = _WORDS

_NOWHERE: Final = b"\0"
"""In place of a time that there is not: no payload has it."""

_NULL: Final = b"null"

_INSTANT: Final = timedelta(microseconds=1)


class _Blank(NamedTuple):
    """A payload with a gap for each placeholder. `own` picks what belongs into the gaps, in their order."""

    text: bytes
    own: Any


class Moment(NamedTuple):
    """When notifications are decided about, and how that is written down: once for all of a round."""

    now: datetime
    text: bytes


def moment_of(now: datetime) -> Moment:
    """The moment of a round."""
    return Moment(now, encode(now))


class Form(NamedTuple):
    """What is written down of notifications that are alike.

    Attributes:
        jobs: each with its subject up to the user.
        ttl: how long the rule has them live if they do not say so themselves.
        held: the rules and the profile that it was made from. Forms are found by the identity of these objects, so a form keeps
            them alive.
    """

    receipt: _Blank | None
    jobs: tuple[tuple[str, _Blank], ...]
    ttl: timedelta | None
    held: tuple[object, ...]

    def filled(self, found: Found, user: str, at: Moment) -> tuple[Outgoing | None, tuple[Outgoing, ...]] | None:
        """The receipt and the jobs of a notification that is decided about now; None: it has expired, unlike the others."""
        entry, stored_at, now = found.entry, found.stored_at, at.now
        expires_at, trace, key = entry.expires_at, entry.trace, entry.collapse_key
        if expires_at is None and self.ttl is not None:
            expires_at = stored_at + self.ttl
        if expires_at is not None and expires_at <= now:
            return None
        own = (
            at.text,
            encode(stored_at),
            _NULL if expires_at is None else encode(expires_at),
            encode(entry.id),
            encode(user),
            _NULL if trace is None else encode(trace),
            _NULL if key is None else encode(key),
            entry.data,
        )
        token, receipt = found.user_token, self.receipt
        return (
            receipt_message(found.subject, receipt.text % receipt.own(own), trace) if receipt is not None else None,
            tuple([Outgoing(subject + token, text % gaps(own)) for subject, (text, gaps) in self.jobs]),
        )


def with_placeholders(due: Due, now: datetime) -> Due:
    """The notification with placeholders for what is its own. Its times differ, so that none is taken for another."""
    notification = due.notification
    return due._replace(
        notification=msgspec.structs.replace(
            notification,
            id=_ID,
            user=_USER,
            expires_at=now + _INSTANT if notification.expires_at is not None else None,
        ),
        stored_at=now - _INSTANT,
        trace=_TRACE if due.trace is not None else None,
        collapse_key=_COLLAPSE_KEY if due.collapse_key is not None else None,
        data=msgspec.Raw(encode(_DATA)),
    )


def form_of(
    inputs: Inputs,
    decisions: Iterable[Decision],
    receipt: Outgoing | None,
    jobs: Sequence[Outgoing],
    held: tuple[object, ...],
) -> Form | None:
    """The form of what was made of a notification `with_placeholders`; None: what is made of others is not the same."""
    if has_moments(inputs) or any(one.when not in ("now", "never") for one in decisions):
        return None
    if any(one.why == "expired" for one in decisions):
        return None  # it would be over before it was due, and whether another one is depends on its own times
    if receipt is not None and len(receipt.payload) > INPUTS_BYTES_MAX // 2:
        return None  # with longer names it may be too large
    times = (inputs.now, inputs.facts.stored_at, inputs.expires_at)
    placeholders = [encode(one) if one is not None else _NOWHERE for one in (*times, *_WORDS)]
    rule = inputs.rule
    return Form(
        _blank(receipt.payload, placeholders) if receipt is not None else None,
        tuple([(one.subject.removesuffix(_USER), _blank(one.payload, placeholders)) for one in jobs]),
        timedelta(seconds=rule.ttl_seconds) if rule is not None and rule.ttl_seconds is not None else None,
        held,
    )


def _blank(payload: bytes, placeholders: Sequence[bytes]) -> _Blank:
    pieces = re.split(b"(%b)" % b"|".join(map(re.escape, placeholders)), payload)
    text = b"%b".join(piece.replace(b"%", b"%%") for piece in pieces[::2])
    return _Blank(text, itemgetter(*map(placeholders.index, pieces[1::2])))
