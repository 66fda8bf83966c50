"""Appending to EVENTS: another publisher's event must never be taken for ours (ADR 0023).

The broker calls a message a duplicate when an earlier one had the same `Nats-Msg-Id`, whoever sent that one and on whatever
subject. So a publisher that foresees another's message id could suppress its event, and the PubAck would call the event stored.

A connection with a secret of its own (a password, a credentials file) seals its message ids with it: whoever publishes
with the same login makes the same ids, and nobody else can foresee them. Without accounts there is no such secret, but then
everybody may read: whoever is told "duplicate" looks at the event that the broker calls the first one.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
from typing import Final

import msgspec

from seamark.protocol.events import Encoded

RETRIED_ERR_CODES: Final = frozenset({10008, 10009, 10158, 10164, 10167, 10210})
"""Passing states of the server: no leader or quorum yet, a duplicate id in process, a CAS racing another, batches in flight."""

_SEAL_BYTES: Final = 16
"""Of an HMAC-SHA256: 128 bits are not guessed within the two minutes of the broker's window."""


def sealed(msg_id: str, secret: bytes) -> str:
    """A message id that only those who know the secret can foresee; the same for the same event each time."""
    seal = hmac.digest(secret, msg_id.encode(), hashlib.sha256)[:_SEAL_BYTES]
    return f"{msg_id}:{base64.urlsafe_b64encode(seal).rstrip(b'=').decode()}"


class _Identity(msgspec.Struct):
    """The one member of a stored event that says which event it is."""

    id: str = ""


_identity_of = msgspec.json.Decoder(_Identity).decode


def is_same(event: Encoded, subject: str, payload: bytes) -> bool:
    """Whether what is stored under `ev.<q>.<tenant>.<key>.<type>` is this event: an event is named by tenant and id."""
    try:
        id = _identity_of(payload).id
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False
    return f"{subject.split('.')[2]}:{id}" == event.msg_id
