"""What a connection hands to the app: items in order, within bounds, and which of them the app is done with."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from seamark.client.items import Item, Live, Now, Problem, Record, Reset
from seamark.client.keeper import Keeper
from seamark.client.mailbox import Mailbox
from seamark.client.receiver import Position
from seamark.protocol.frames import Unread

WAITING_RECORDS_MAX: Final = 1024
WAITING_BYTES_MAX: Final = 4 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class _Moved:
    """The log moved without anything for the app; `live` when it is caught up."""

    to: Position
    live: bool


@dataclass(frozen=True, slots=True)
class _Arrival:
    """A record or snapshot, with the generation of cursors it belongs to."""

    item: Record | Reset
    generation: int


@dataclass(frozen=True, slots=True)
class _Taken:
    """What the app was given last."""

    ticket: int
    cursor: str
    generation: int
    automatic: bool


class Delivery:
    """The way from the sessions to the app's loop.

    Args:
        keeper: is told what the app took and what it is done with.
        acknowledge: is called with the generation and cursor of what is done.
        on_reset: called (and awaited, if it gives an awaitable) with each `Reset`, in its place among the records.
        auto_ack: asking for the next item says that the last one is done.
    """

    def __init__(
        self,
        keeper: Keeper,
        acknowledge: Callable[[int, str], None],
        on_reset: Callable[[Reset], object] | None,
        *,
        auto_ack: bool,
    ) -> None:
        self._keeper = keeper
        self._acknowledge = acknowledge
        self._on_reset = on_reset
        self._auto_ack = auto_ack
        self._taken: _Taken | None = None
        self._mailbox: Mailbox[_Arrival | _Moved | Unread | Now | Problem] = Mailbox(
            WAITING_RECORDS_MAX, WAITING_BYTES_MAX
        )

    # -- from the sessions ---------------------------------------------------------------------------------------------

    async def put_log(self, item: Record | Reset, generation: int) -> None:
        """A record or snapshot; waits for room."""
        await self._mailbox.put(_Arrival(item, generation), len(item.raw) if isinstance(item, Record) else 0)

    async def put_position(self, to: Position, *, live: bool) -> None:
        """The log moved without anything for the app; waits for room."""
        await self._mailbox.put(_Moved(to, live))

    async def put(self, item: Unread | Now | Problem) -> None:
        """Something beside the log; waits for room."""
        await self._mailbox.put(item)

    def add(self, problem: Problem) -> None:
        """The same without waiting: for what is told to whoever would have to make room."""
        self._mailbox.add(problem)

    def end(self, error: BaseException | None = None) -> None:
        """Nothing more will come; the app learns `error` after what waits."""
        self._mailbox.end(error)

    # -- to the app ----------------------------------------------------------------------------------------------------

    async def next(self) -> Item:
        """The next item; what was taken before is done, where that is not for the app to say.

        Raises:
            StopAsyncIteration: nothing more will come. Whatever `on_reset` raises, and what `end` was given.
        """
        if self._taken is not None and self._taken.automatic:
            self._done(self._taken)
        while True:
            item = await self._mailbox.get()
            if isinstance(item, _Arrival):
                return await self._take(item)
            if isinstance(item, _Moved):
                self._keeper.passed(item.to.cursor)
                if not item.live:
                    continue
                return Live(*item.to)
            return item

    async def _take(self, arrival: _Arrival) -> Record | Reset:
        item = arrival.item
        # A snapshot is replaced whole, so it is done when the app comes back, also where records are acked by hand.
        automatic = self._auto_ack or isinstance(item, Reset)
        if isinstance(item, Reset):
            await self._tell_reset(arrival, item)
        taken = _Taken(self._keeper.taken(item.cursor), item.cursor, arrival.generation, automatic)
        self._taken = taken
        if isinstance(item, Record):
            item.bind(lambda: self._done(taken))
        return item

    async def _tell_reset(self, arrival: _Arrival, reset: Reset) -> None:
        if self._on_reset is None:
            return
        try:
            result = self._on_reset(reset)
            if inspect.isawaitable(result):
                await result
        except BaseException:
            self._mailbox.put_back(arrival)  # it is not done: an app that asks again gets it again
            raise

    def _done(self, taken: _Taken) -> None:
        if self._keeper.done(taken.ticket, taken.cursor):
            self._acknowledge(taken.generation, taken.cursor)
