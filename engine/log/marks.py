"""Marks: a position stored in the very batch it covers, and what to do when a batch was not confirmed.

Whoever writes down in one stream what follows from another (a dispatcher: records in a LOG from EVENTS) ends every batch with
a mark, which must follow exactly the mark this owner knows (`Nats-Expected-Last-Subject-Sequence`). A stale owner's batch is
therefore refused whole, and a reader of the mark knows what is applied: there is no window in which it must guess.
"""

from __future__ import annotations

import enum
from typing import Final, NamedTuple

import msgspec

ROLLUP_LINE: Final = b"Nats-Rollup:sub\r\n"
"""Header of a message that takes the place of all before it on its subject."""


class MarkedStream(NamedTuple):
    """A stream that is written from a source.

    Args:
        source: the stream whose sequence its marks count, such as EVENTS.
        name: the stream itself, such as LOG-3.
        subject: where in it the marks of this writer are. Writers of other parts of the source have other subjects.
        rollup: whether a mark takes the place of the one before. Where marks do not leave by age, they must.
    """

    source: str
    name: str
    subject: str
    rollup: bool = False

    def lines(self, expected_seq: int) -> bytes:
        """Header lines of the mark that must follow the one at `expected_seq`; 0: it is the first."""
        expected = b"Nats-Expected-Last-Subject-Sequence:%d\r\n" % expected_seq
        return expected + ROLLUP_LINE if self.rollup else expected


class Mark(msgspec.Struct, frozen=True, omit_defaults=True):
    """All up to message `seq` of the source is applied in this stream; with `user`, of `seq` only the users up to that token.

    Args:
        epoch: incarnation of the source that `seq` belongs to.
        term: counts the owners; `owner` is random per acquisition.
        stream_epoch: incarnation of the stream the mark is in.
        unburied: in a dispatcher's home mark, the first event whose dead letter is still missing; None: no letter is
            missing (ADR 0014).
        refused: in the same, the first event from which on nothing is put off, and whose letter may be missing for that reason.
    """

    epoch: str
    seq: int
    term: int
    owner: str
    stream_epoch: str = msgspec.field(name="log_epoch")
    user: str | None = None
    unburied: int | None = None
    refused: int | None = None

    @property
    def next_seq(self) -> int:
        """What to read next: the same message again when only some of its users are done."""
        return self.seq if self.user is not None else self.seq + 1

    def covers(self, seq: int, user_token: str) -> bool:
        """Is what follows from message `seq` for this user applied already?"""
        return seq < self.seq or (seq == self.seq and (self.user is None or user_token <= self.user))

    def up_to(self, seq: int) -> Mark:
        """The same mark, but covering no event beyond `seq`: those are dispatched, and buried, again."""
        if self.seq <= seq:
            return self
        unburied, refused = (None if at is None or at > seq else at for at in (self.unburied, self.refused))
        return msgspec.structs.replace(self, seq=seq, user=None, unburied=unburied, refused=refused)


class PlacedMark(NamedTuple):
    """A mark and the sequence of its message; sequence 0 and no mark when there is none."""

    seq: int
    mark: Mark | None


NO_MARK = PlacedMark(0, None)

encode_mark = msgspec.json.Encoder().encode
decode_mark = msgspec.json.Decoder(Mark).decode


class Verdict(enum.Enum):
    """What became of a batch that was refused or not answered."""

    COMMITTED = "committed"
    SEND_AGAIN = "send again"
    ASK_AGAIN = "ask again"
    STEP_DOWN = "step down"
    TAKE_OVER = "take over"
    GONE = "gone"
    FOLLOW = "follow"


def settle(sent: Mark, expected: PlacedMark, found: PlacedMark) -> Verdict:
    """Judge an unconfirmed batch by the mark its leader shows now.

    Args:
        sent: the mark that ended the batch.
        expected: the mark the batch demanded to follow.
        found: the mark as the leader shows it.

    Returns:
        COMMITTED: it is stored. SEND_AGAIN: it is not, nothing has changed. ASK_AGAIN: the answer is older than what I
        know to be stored. STEP_DOWN: a newer owner is at work. TAKE_OVER: an older owner got in before me; take over and
        go on from what it says. GONE: there is no mark where one was expected; ask for the stream's epoch. FOLLOW: it is
        mine and newer than the one I demanded, so "there is none" was a stale answer: demand this one and send again.
    """
    if found.mark is None:
        return Verdict.SEND_AGAIN if expected.mark is None else Verdict.GONE
    if found == expected:
        return Verdict.SEND_AGAIN
    if found.mark == sent:
        return Verdict.COMMITTED
    if found.mark.owner == sent.owner:
        return Verdict.FOLLOW if found.seq > expected.seq else Verdict.ASK_AGAIN
    return Verdict.STEP_DOWN if found.mark.term >= sent.term else Verdict.TAKE_OVER
