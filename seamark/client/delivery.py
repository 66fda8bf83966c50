"""What a connection hands to the app: items in order, within bounds, and which of them the app is done with."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Final

from seamark.client.items import Item, Live, Now, Problem, Record, Reset
from seamark.client.keeper import Keeper
from seamark.client.mailbox import Mailbox
from seamark.client.traces import Handling
from seamark.protocol.frames import Unread

WAITING_RECORDS_MAX: Final = 1024
WAITING_BYTES_MAX: Final = 4 * 1024 * 1024


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
        self._handling = Handling()
        self._finish: Callable[[], None] | None = None
        """Says that what the app was given last is done, where asking for more says so."""
        self._mailbox: Mailbox[tuple[Record | Reset, int] | str | Live | Unread | Now | Problem] = Mailbox(
            WAITING_RECORDS_MAX, WAITING_BYTES_MAX
        )

    # -- from the sessions ---------------------------------------------------------------------------------------------

    async def put_entry(self, item: Record | Reset, generation: int) -> None:
        """A record or snapshot, with the generation of cursors it belongs to; waits for room."""
        await self._mailbox.put((item, generation), len(item.raw) if isinstance(item, Record) else 0)

    async def put(self, item: str | Live | Unread | Now | Problem) -> None:
        """Anything else; waits for room. A cursor alone says that the log moved there without anything for the app."""
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
        if self._finish is not None:
            self._finish()
        while True:
            item = await self._mailbox.get()
            match item:
                case str():
                    self._keeper.passed(item)
                case Live():
                    self._keeper.passed(item.cursor)
                    return item
                case (entry, generation):
                    return await self._take(entry, generation)
                case _:
                    return item

    async def _take(self, item: Record | Reset, generation: int) -> Record | Reset:
        if isinstance(item, Reset):
            await self._tell_reset(item, generation)
        ticket = self._keeper.taken(item.cursor)

        def done() -> None:
            if self._keeper.done(ticket, item.cursor):
                self._acknowledge(generation, item.cursor)
                self._handling.done(ticket)

        if isinstance(item, Record):
            self._handling.taken(ticket, item)
            item.bind(done)
        # A snapshot is replaced whole, so it is done when the app comes back, also where records are acked by hand.
        self._finish = done if self._auto_ack or isinstance(item, Reset) else None
        return item

    async def _tell_reset(self, reset: Reset, generation: int) -> None:
        if self._on_reset is None:
            return
        try:
            result = self._on_reset(reset)
            if inspect.isawaitable(result):
                await result
        except BaseException:
            self._mailbox.put_back((reset, generation))  # it is not done: an app that asks again gets it again
            raise
