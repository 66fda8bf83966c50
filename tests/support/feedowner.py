"""The owner of a feed in unit tests: it writes down what it is asked for, and answers what the test says."""

from __future__ import annotations

from typing import Any, NamedTuple

from gateway.join.feed import Ask, Feed, FeedCounters, LogState
from seamark.protocol.cursor import Cursor

LOG = LogState("e", 1, 12)


class Record(NamedTuple):
    seq: int


class Owner:
    """The port of a feed: writes down what it is asked for."""

    def __init__(self) -> None:
        self.counters = FeedCounters()
        self.feed = Feed(self, self.counters)
        self.frames: list[Any] = []
        self.asked: list[Any] = []
        self.timers: list[tuple[float, Ask]] = []
        self.places = 1000

    # the port

    def room(self) -> bool:
        return self.places > 0

    def deliver(self, seq, message):
        if not self.room():
            return False
        assert message.seq == seq
        self.places -= 1
        self.frames.append(seq)
        return True

    def resumed(self, cursor):
        self.frames.append(("ready", str(cursor)))

    def caught_up(self, cursor):
        self.frames.append(("live", str(cursor)))

    def reset(self, reason, snapshot, cursor):
        self.frames.append(("reset", reason.value, str(cursor)))
        self.shown = snapshot

    def want_head(self, generation, ask):
        self.asked.append(ask)

    def want_page(self, generation, seq):
        self.asked.append(("page", seq))

    def want_next(self, generation, seq):
        self.asked.append(("next", seq))

    def want_state(self, generation):
        self.asked.append("state")

    def want_snapshot(self, generation, reason):
        self.asked.append("snapshot")

    def later(self, generation, delay_seconds, ask):
        self.timers.append((delay_seconds, ask))

    # what the world does

    def took(self) -> list[Any]:
        """Frames since the last look."""
        frames, self.frames = self.frames, []
        return frames

    def questions(self) -> list[Any]:
        """Questions since the last look."""
        asked, self.asked = self.asked, []
        return asked

    def live(self, seq, prev):
        self.feed.live(seq, prev, Record(seq))

    def head(self, ask, seq, up_to, log=LOG):
        self.feed.head(self.feed.generation, ask, seq, up_to, log)

    def page(self, *seqs, more=False):
        self.feed.page(self.feed.generation, [Record(seq) for seq in seqs], more)

    def next(self, seq):
        self.feed.next(self.feed.generation, None if seq is None else Record(seq))

    def leader(self, log=LOG):
        self.feed.leader(self.feed.generation, log)

    def snapshot(self, snapshot):
        self.feed.snapshot(self.feed.generation, snapshot)

    def timer(self, ask):
        """The last timer set has passed; it was one for `ask`."""
        assert self.timers.pop()[1] is ask
        self.feed.timer(self.feed.generation, ask)


def behind(owner: Owner, cursor: int = 4, head: int = 10) -> Owner:
    """A session that has a page to read, from `cursor` on."""
    owner.feed.hello(Cursor("e", cursor))
    owner.head(Ask.OPENING, head, 12)
    owner.took()
    owner.questions()
    return owner


def joined(owner: Owner) -> Owner:
    """A session that has joined at 10, the newest record of a log that ends at 12."""
    owner.feed.hello(Cursor("e", 10))
    owner.head(Ask.OPENING, 10, 12)
    assert owner.took() == [("ready", "e.10"), ("live", "e.10")]
    assert owner.questions() == [Ask.OPENING]
    return owner
