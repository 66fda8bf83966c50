"""Mistakes one could make in the join of history and live, each as a variant of the feed or of its driver.

The property test must notice every one of them; a mistake that it lets pass would be one it cannot guard against.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from gateway.join.feed import Ask, Feed, LogState, Message, ResetReason, Snapshot, State
from tests.support.joinscenarios import ANEW, Profile
from tests.support.joinsession import Rules


class FirstReadExclusive(Feed):
    """The first read begins behind `last` and is taken for whole."""

    first = True

    def _read(self) -> None:
        self._past = self._past or self.first
        super()._read()

    def page(self, generation: int, messages: Sequence[Message], more: bool) -> None:
        if generation == self.generation and self.state is State.CATCH and self.first:
            self.first = self._past = False
            self._show(messages, more)
        else:
            super().page(generation, messages, more)


class LaterPagesExclusive(Feed):
    """Only the first page proves itself; those behind it begin after `last` and are taken for whole."""

    first = True

    def _read(self) -> None:
        self._past = not self.first
        super()._read()

    def page(self, generation: int, messages: Sequence[Message], more: bool) -> None:
        if generation != self.generation or self.state is not State.CATCH or self.first:
            self.first = False
            super().page(generation, messages, more)
        else:
            self._show(messages, more)

    def _flush(self) -> None:
        self.first = True
        super()._flush()


class NoPrevCheck(Feed):
    """A live copy goes out whatever it says of its predecessor."""

    def live(self, seq: int, prev: int, message: Message, epoch: str = "") -> None:
        super().live(seq, 0, message, epoch)


class NoDuplicateDrop(Feed):
    """A live copy goes out though it, or something after it, was sent before."""

    def live(self, seq: int, prev: int, message: Message, epoch: str = "") -> None:
        if self.state is State.LIVE and seq <= self.last:
            self._port.deliver(seq, message)
        else:
            super().live(seq, prev, message, epoch)


class NoHeadsCheck(Feed):
    """Nobody looks whether something was lost at the end."""

    def check(self) -> None:
        pass


class TrimTestBeforeThePage(Feed):
    """The leader is asked for what was trimmed, then the page is read and believed."""

    before = False

    def _read(self) -> None:
        self._busy = self.before = self._port.room()
        if self._busy:
            self._port.want_state(self.generation)

    def leader(self, generation: int, state: LogState) -> None:
        whole = state.epoch == self.epoch and self.last >= state.first_seq - 1
        if generation == self.generation and self.state is State.CATCH and self.before and whole:
            self.before = False
            super()._read()
        else:
            super().leader(generation, state)

    def page(self, generation: int, messages: Sequence[Message], more: bool) -> None:
        if generation == self.generation and self.state is State.CATCH:
            self._show(messages, more)


class HeadAsResetCursor(Feed):
    """After a reset the log goes on at its end, not at the snapshot."""

    def _begin_anew(self, head: int, log: LogState) -> None:
        snapshot = self._snapshot
        if snapshot is not None and snapshot.checkpoint is not None and snapshot.checkpoint.epoch == log.epoch:
            self._snapshot = replace(snapshot, checkpoint=snapshot.checkpoint._replace(seq=log.last_seq))
            port, shown = self._port, snapshot
            self._port = _Shown(port, shown)
            super()._begin_anew(head, log)
            self._port = port
        else:
            super()._begin_anew(head, log)


class _Shown:
    """A port that shows the snapshot as it was."""

    def __init__(self, port: Any, snapshot: Snapshot) -> None:
        self.port = port
        self.shown = snapshot

    def __getattr__(self, name: str) -> Any:
        return getattr(self.port, name)

    def reset(self, reason: ResetReason, snapshot: Snapshot, cursor: Any) -> None:
        self.port.reset(reason, self.shown, cursor)


class StaleHeadBelieved(Feed):
    """A replica's head is taken as it comes."""

    def _is_stale(self, up_to: int, log: LogState) -> bool:
        return False


class OverflowForgets(Feed):
    """A full cache of parked copies is dropped, and with it that they exist."""

    def _park(self, seq: int, prev: int, message: Message, epoch: str) -> None:
        if self._parked is not None and len(self._parked) >= self._parked_limit:
            self._parked.clear()
            self._want = self.last
        else:
            super()._park(seq, prev, message, epoch)


class EpochNeverReadAgain(Feed):
    """The incarnation of the log is looked at once, in the hello."""

    def watch(self, state: LogState) -> None:
        super().watch(state._replace(epoch=self.epoch))

    def leader(self, generation: int, state: LogState) -> None:
        super().leader(generation, state._replace(epoch=self.epoch))

    def _checked(self, ask: Ask, head: int, up_to: int, log: LogState) -> None:
        super()._checked(ask, head, up_to, log._replace(epoch=self.epoch))


class FirstPageBelieved(Feed):
    """A page that shows less than what was heard of is taken for all there is."""

    def _stall(self) -> None:
        self._gone_up_to = self._want
        self._forget_gone()


class NeverAsksForTheGone(Feed):
    """Replicas are asked for ever for what has been erased."""

    def _stall(self) -> None:
        self._port.later(self.generation, 0.5, Ask.PAGE)


class GoneWithoutTrimTest(Feed):
    """What the leader does not hold was erased, never trimmed."""

    def next(self, generation: int, message: Message | None) -> None:
        if message is None and generation == self.generation and self.state is State.CATCH:
            self._forget_gone()
        else:
            super().next(generation, message)


class UnseenCursorTrimmed(Feed):
    """A page that does not begin with the cursor's own record means that it was trimmed."""

    def leader(self, generation: int, state: LogState) -> None:
        if generation == self.generation and self.state is State.CATCH and self._held is not None and self._held[0]:
            self._reset(ResetReason.TRIMMED)
        else:
            super().leader(generation, state)


class ReplicaSaysFuture(Feed):
    """A cursor beyond what a replica shows is called too high."""

    def _opened(self, ask: Ask, head: int, up_to: int, log: LogState) -> None:
        if up_to < self.last:
            self._reset(ResetReason.FUTURE)
        else:
            super()._opened(ask, head, up_to, log)


class OneWordSaysFuture(Feed):
    """One answer of a leader that may still be applying is enough to call the cursor too high."""

    def watch(self, state: LogState) -> None:
        if self.state is State.LIVE and state.last_seq < self.last:
            self._reset(ResetReason.FUTURE)
        else:
            super().watch(state)


class NeverGoesBack(Feed):
    """The log's end is never compared with what was sent."""

    def watch(self, state: LogState) -> None:
        super().watch(state._replace(last_seq=max(state.last_seq, self.last)))


class OldAnswersCount(Feed):
    """Answers to questions from before a reset are taken."""

    def head(self, generation: int, ask: Ask, seq: int, up_to: int, state: LogState) -> None:
        super().head(self.generation, ask, seq, up_to, state)

    def page(self, generation: int, messages: Sequence[Message], more: bool) -> None:
        super().page(self.generation, messages, more)

    def leader(self, generation: int, state: LogState) -> None:
        super().leader(self.generation, state)


class ParkedUnchecked(Feed):
    """Parked copies go out as they came, whatever they say of their predecessors."""

    def _use_parked(self) -> None:
        parked, self._parked = self._parked, None
        for seq, (_, message, _) in (parked or {}).items():
            if seq > self.last and self._busy:
                self._send(seq, message)


class CopiesOfAnyLog(Feed):
    """A live copy goes out whatever log it says to be of."""

    def live(self, seq: int, prev: int, message: Message, epoch: str = "") -> None:
        super().live(seq, prev, message)


class ParkedOutlivesTheLog(CopiesOfAnyLog):
    """Copies parked before a reset are kept, though the log may have been made anew before it was answered."""

    def _drop_parked(self) -> None:
        pass


class Mutant(NamedTuple):
    """A mistake, and what the simulation must complain of: any other complaint would be about something else."""

    rules: Rules
    complaint: str
    profile: Profile | None = None
    """The kind of scenarios that show it; None: all in turn."""


MUTANTS: dict[str, Mutant] = {
    "first read exclusive": Mutant(Rules(feed=FirstReadExclusive), "was left out"),
    "later pages exclusive": Mutant(Rules(feed=LaterPagesExclusive), "was left out"),
    "no prev check": Mutant(Rules(feed=NoPrevCheck), "was left out"),
    "no duplicate drop": Mutant(Rules(feed=NoDuplicateDrop), "doubled or out of order"),
    "no heads check": Mutant(Rules(feed=NoHeadsCheck), "not at the head"),
    "trim test before the page": Mutant(Rules(feed=TrimTestBeforeThePage), "was left out"),
    "head as reset cursor": Mutant(Rules(feed=HeadAsResetCursor), "leaves out what its snapshot"),
    "stale head believed": Mutant(Rules(feed=StaleHeadBelieved), "was left out"),
    "parked overflow forgets": Mutant(Rules(feed=OverflowForgets), "not shown after"),
    "subscribe after reading": Mutant(Rules(subscribe_late=True), "not shown after"),
    "epoch never read again": Mutant(Rules(feed=EpochNeverReadAgain), "in another incarnation"),
    "frames revoked": Mutant(Rules(revoke_frames=True), "says it follows"),
    "first page believed": Mutant(Rules(feed=FirstPageBelieved), "was left out"),
    "never asks for the gone": Mutant(Rules(feed=NeverAsksForTheGone), "not live after all"),
    "gone without trim test": Mutant(Rules(feed=GoneWithoutTrimTest), "was left out"),
    "unseen cursor trimmed": Mutant(Rules(feed=UnseenCursorTrimmed), "reset(trimmed)"),
    "replica says future": Mutant(Rules(feed=ReplicaSaysFuture), "reset(future)"),
    "one word says future": Mutant(Rules(feed=OneWordSaysFuture), "reset(future)"),
    "never goes back": Mutant(Rules(feed=NeverGoesBack), "was not told that the log went back"),
    "old answers count": Mutant(Rules(feed=OldAnswersCount), "reset("),
    "parked unchecked": Mutant(Rules(feed=ParkedUnchecked), "was left out"),
    "copies of any log": Mutant(Rules(feed=CopiesOfAnyLog), "taken for one of another log", ANEW),
    "parked outlives the log": Mutant(Rules(feed=ParkedOutlivesTheLog), "of a log that is no more", ANEW),
}
