"""`connect`: one device's way to its user's log, over any number of sessions."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Final, Self

import aiohttp

from seamark.backoff import Backoff
from seamark.client.cursorstore import Bookmark, CursorStore, MemoryCursor
from seamark.client.delivery import Delivery
from seamark.client.errors import ConnectionClosed, NotAuthenticated, UserChanged, error_of
from seamark.client.items import Item, Live, Now, Place, Problem, Record, Reset, State
from seamark.client.keeper import Keeper
from seamark.client.marks import Lost
from seamark.client.receiver import Advance, Deliver, Joined, Notice, Outcome, Position, Receiver, Restore
from seamark.client.session import End, Session, Timing, endpoint
from seamark.client.token import Owner, TokenCallable, TokenSource
from seamark.client.uplink import Uplink
from seamark.protocol.close_codes import STOP, TOO_MANY_FRAMES, UNAUTHENTICATED
from seamark.protocol.frames import NOW, ErrorFrame, Hello, NowFrame, Ready, Unread, UnreadFrame

log = logging.getLogger("seamark.client")

TOO_MANY_SECONDS: Final = 60.0
"""How long to stay away after 4429, unless the gateway names a time: its bucket of frames is a minute's."""


class Connection:
    """A device's connection to its user's log: an async iterator of records that outlives its sessions.

    Iterating yields `Record`s in log order, each once; `events()` yields also `Reset`, `Live`, `Unread`,
    `Now` and `Problem`.
    A record is done when the app asks for the next one (`auto_ack=False`: when it calls `record.ack()`). Done records
    are stored and acknowledged, so an app that dies in the middle of one gets it again: at least once. Leaving the
    loop does not count as done: call `ack()` first if it is.

    ```python
    async with connect("https://notify.example.com", token=fetch_token, device="kitchen") as records:
        async for record in records:
            print(record.seq, record.type, record.data)
    ```

    Args:
        url: the gateway's address.
        token: the user's JWT, or a callable (plain or async) that gives a fresh one. It is asked at the start, before a
            token expires and when one is refused, not at every reconnect.
        device: the device's name, stable over restarts: the gateway remembers what it acknowledged. Random if absent.
        cursor: where to begin if the store has nothing of this user: a bookmark or cursor that the app kept itself, or
            "start" for the oldest kept record. Without any the gateway decides: it knows the device, or answers with a
            reset.
        store: where the bookmark of what is done is kept; in memory if absent.
        snapshot: begin with a `Reset` that holds the inbox: for an app that shows one and keeps none over restarts.
            State and position belong together, so it goes with neither `cursor` nor `store`.
        auto_ack: asking for the next record says that the last one is done. False: `record.ack()` says it.
        on_reset: called (and awaited, if it gives an awaitable) with each `Reset`, in its place among the records.
        on_state: called with each new `State`.
        backoff: waits between attempts; 0.5 s doubling to 30 s with full jitter if absent.
        timing: deadlines.
        http: an aiohttp session to use; the app closes it.

    Raises:
        ValueError: `url` is not an address, or `snapshot` is not alone.
        NotAuthenticated, UserChanged, TooManySessions, ClientError (its message has the close code), whatever the store raises:
            while iterating, after what had arrived before. Everything else is retried for ever, with full jitter.
    """

    def __init__(
        self,
        url: str,
        *,
        token: str | TokenCallable,
        device: str | None = None,
        cursor: str | Bookmark | None = None,
        store: CursorStore | None = None,
        snapshot: bool = False,
        auto_ack: bool = True,
        on_reset: Callable[[Reset], object] | None = None,
        on_state: Callable[[State], object] | None = None,
        backoff: Backoff | None = None,
        timing: Timing | None = None,
        http: aiohttp.ClientSession | None = None,
    ) -> None:
        if snapshot and (cursor is not None or store is not None):
            raise ValueError("`snapshot` begins without a position: leave `cursor` and `store` out")
        self.device = device or f"python-{secrets.token_hex(4)}"
        self.state = State.NEW
        self.unread: Unread | None = None
        self.session_id: str | None = None
        self.capabilities: tuple[str, ...] = ()
        """What the gateway can do beyond the first version of the protocol."""
        self.reconnects = 0
        """Sessions that ended and were followed, or tried to be followed, by another."""
        self.last_end: End | None = None
        self._url = endpoint(url)
        self._given = Bookmark(cursor) if isinstance(cursor, str) else cursor
        self._snapshot = snapshot
        self._stored: Bookmark | None = None
        self._keeper = Keeper(store or MemoryCursor())
        self._token = TokenSource(token)
        self._on_state = on_state
        self._backoff = backoff or Backoff()
        self._timing = timing or Timing()
        self._http, self._own_http = http, http is None
        self._receiver = Receiver()
        self._uplink = Uplink(self._token, self._timing, lambda: self._receiver.position, self._lost)
        self._delivery = Delivery(self._keeper, self._uplink.ack, on_reset, auto_ack=auto_ack)
        self._tasks: list[asyncio.Task[None]] = []
        self._started = self._begun = False
        self._closed = False

    # -- life ---------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Begin to connect. Called by `async with` and by the first iteration.

        Raises:
            Whatever the store raises.
        """
        if self._closed:
            raise ConnectionClosed
        if self._started:
            return
        self._started = True
        try:
            self._stored = await self._keeper.store.load()
            if self._closed:
                raise ConnectionClosed
        except BaseException:
            self._started = False  # who asks again must not wait for what nobody brings
            raise
        if self._http is None:
            self._http = aiohttp.ClientSession()
        self._tasks = [
            asyncio.create_task(self._keep_connected(), name="seamark-connection"),
            asyncio.create_task(self._keep_stored(), name="seamark-cursor"),
        ]

    async def close(self) -> None:
        """End the connection. What is done is stored when this returns, and acknowledged if a session stood."""
        if self._closed:
            return
        self._closed = True
        try:
            await self._uplink.flush()
        finally:  # whoever gives up waiting for a dead way leaves nothing behind
            await self._end()

    async def _end(self) -> None:
        if unsaid := self._uplink.marks.unsaid:
            log.warning("%d read marks were never said: the connection was closed before it had caught up", unsaid)
        for task in self._tasks[:1]:
            task.cancel()
        self._keeper.close()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._delivery.end()
        try:
            if self._tasks:
                await self._keeper.save()
        finally:
            if self._own_http and self._http is not None:
                await self._http.close()
            self._set_state(State.CLOSED)  # at the end: it is the app's code, and may fail

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    # -- what the app gets ---------------------------------------------------------------------------------------------

    @property
    def cursor(self) -> str | None:
        """The cursor that is (or is about to be) stored: everything up to it is done."""
        return self._keeper.cursor

    @property
    def bookmark(self) -> Bookmark | None:
        """The same with its tenant and user, for an app that stores it with its state and passes it back as `cursor`."""
        cursor = self._keeper.cursor
        return None if cursor is None else Bookmark(cursor, *self._keeper.owner)

    @property
    def position(self) -> str | None:
        """Where the next session resumes: behind everything received, done or not."""
        held = self._receiver.position
        return None if held is None else held.cursor

    def __aiter__(self) -> AsyncIterator[Record]:
        return self

    async def __anext__(self) -> Record:
        while True:
            item = await self._next()
            if isinstance(item, Record):
                return item

    async def events(self) -> AsyncIterator[Item]:
        """Everything in order: `Record`, `Reset`, `Live`, `Unread`, `Now`, `Problem`."""
        while True:
            try:
                item = await self._next()
            except StopAsyncIteration:
                return
            yield item

    async def _next(self) -> Item:
        await self.start()
        return await self._delivery.next()

    # -- what the app says ---------------------------------------------------------------------------------------------

    async def read(
        self,
        *,
        ids: Sequence[str] | None = None,
        up_to: Place | None = None,
        all: bool = False,
    ) -> None:
        """Mark as read: these ids, or everything up to a record (a reset, a `Live`), or everything received so far.

        The mark is a record of the log: it comes back to every device of the user, this one too, and that is its
        confirmation. Until then it is kept here, and said again on every session. Marks made in quick
        succession go out together.

        Raises:
            ClientError: more than 1000 ids that the log has not shown yet. ConnectionClosed: the connection is closed.
            ValueError: not exactly one of the three was given, or what can be no id. TypeError: `up_to` is no place in a log.
        """
        if self._closed:
            raise ConnectionClosed
        if (ids is not None) + (up_to is not None) + all != 1:
            raise ValueError("give exactly one of ids, up_to and all=True")
        if ids is not None:
            self._uplink.read_ids(ids)
            return
        # "All" is fixed here: sent after a reconnect it would cover records that the user has not seen.
        position = self._receiver.position
        if up_to is not None:
            if not isinstance(up_to, Place):
                raise TypeError("up_to takes a Record, Reset or Live that this connection has given")
            position = Position(up_to.cursor, up_to.seq)
        if position is not None:
            self._uplink.read_up_to(position)

    # -- sessions ------------------------------------------------------------------------------------------------------

    async def _keep_connected(self) -> None:
        try:
            while True:
                self._set_state(State.CONNECTING)
                end = await self._one_session()
                self._uplink.ended()
                self.last_end = end
                delay = self._after(end)
                self.reconnects += 1
                log.info("connection ended (%d %s); next attempt in %.2f s", end.code, end.reason, delay)
                self._set_state(State.WAITING)
                await asyncio.sleep(delay)
        except Exception as error:
            # The app learns it where it waits: in its loop. First, as its own `on_state` may be what failed.
            self._delivery.end(error)
            self._set_state(State.CLOSED)

    async def _one_session(self) -> End:
        assert self._http is not None
        try:
            async with asyncio.timeout(self._timing.connect_seconds):
                token = await self._token.next()
        except (NotAuthenticated, UserChanged):
            raise
        except Exception as failed:
            # The app's token service is as likely to be away for a moment as the gateway is.
            return End(1006, f"no token: {str(failed) or type(failed).__name__}")
        assert self._token.owner is not None
        self._begin(self._token.owner)
        session = Session(self._receiver, self._handle, self._timing)
        self._uplink.begins(session)
        cursor = self._receiver.resume_cursor
        snapshot = self._snapshot and cursor is None
        hello = Hello(token=token, device=self.device, cursor=cursor, snapshot=snapshot, capabilities=[NOW])
        up = self._uplink
        tending = [up.tend_acks(), up.tend_reads(), up.tend_marks(), up.tend_token()]
        return await session.run(self._http, self._url, hello, tending)

    def _begin(self, owner: Owner) -> None:
        """The first token tells whose log this is, and so which of the bookmarks is a place in it."""
        self._keeper.owner = owner
        if self._begun:
            return
        self._begun = True
        for one in (self._stored, self._given):
            if one is None:
                continue
            if (one.tenant, one.user) in ((None, None), owner):
                self._receiver = Receiver(one.cursor)
                return
            log.warning("a bookmark of another user is not used")

    def _after(self, end: End) -> float:
        """How long to wait after `end`; raises where there is nothing to wait for."""
        renew = end.code == UNAUTHENTICATED.code
        if renew and end.token_sent:  # otherwise the refusal says nothing about the token
            self._token.refused()
        if end.code in STOP or (renew and self._token.exhausted):
            raise error_of(end.code, end.reason)
        delay = self._backoff.next_seconds()
        asked = end.retry_after_seconds
        if asked is None and end.code == TOO_MANY_FRAMES.code:
            asked = TOO_MANY_SECONDS
        # What the gateway asks for is spread already: a little of ours on top, never less.
        return delay if asked is None else asked + min(delay, 1.0)

    async def _handle(self, outcome: Outcome) -> None:
        match outcome:
            case Deliver(frame):
                self._uplink.shown(frame)
                record = Record(frame.seq, frame.prev, frame.cursor, bytes(frame.record))
                await self._delivery.put_entry(record, self._uplink.generation)
            case Advance(to, live):
                if live:
                    self._backoff.succeeded()
                    self._set_state(State.LIVE)
                await self._delivery.put(Live(*to) if live else to.cursor)
                if live:
                    await self._uplink.live()
            case Joined(frame):
                await self._joined(frame)
            case Restore(frame):
                self._uplink.reset(frame)
                self.unread = frame.unread
                count = None if frame.unread is None else frame.unread.count
                reset = Reset(frame.reason, frame.cursor, frame.seq, count, frame.inbox, frame.stale)
                await self._delivery.put_entry(reset, self._uplink.generation)
            case Notice(UnreadFrame() as frame):
                self.unread = Unread(frame.count, frame.as_of, frame.more, frame.categories, frame.stale)
                await self._delivery.put(self.unread)
            case Notice(NowFrame() as frame):
                await self._delivery.put(Now(frame.type, frame.data, frame.id))
            case Notice(ErrorFrame() as frame):
                self._uplink.refused(frame)
                await self._delivery.put(Problem(frame.code, frame.detail))
            case _:
                pass

    async def _joined(self, frame: Ready) -> None:
        self._token.accepted()
        self.session_id, self.capabilities = frame.session, frame.capabilities
        self._set_state(State.CATCHING_UP)
        if frame.unread is not None:
            self.unread = frame.unread
            await self._delivery.put(frame.unread)
        if frame.resumed:
            self._uplink.stands()

    def _lost(self, lost: Lost) -> None:
        log.warning("read marks were given up: the log has never shown them")
        detail = "read marks were given up: the log has never shown them, or is another one now"
        self._delivery.add(Problem("mark_lost", detail, lost.ids, lost.up_to))

    async def _keep_stored(self) -> None:
        try:
            await self._keeper.keep_stored()
        except Exception as error:
            # An app that believes its cursor is stored when it is not would lose its place: tell it in its loop.
            self._delivery.end(error)
            self._tasks[0].cancel()
            self._set_state(State.CLOSED)

    def _set_state(self, state: State) -> None:
        if state is not self.state and (not self._closed or state is State.CLOSED):
            self.state = state
            if self._on_state is not None:
                self._on_state(state)


connect: Final = Connection
"""Follow a user's log as one of the user's devices: see `Connection`."""
