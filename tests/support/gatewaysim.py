"""A gateway of `seamark.v1` in memory, for what a real one cannot be made to do on request: lose, double and reorder
frames, close with any code, refuse tokens, fall silent.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web

import gateway as web_package
from gateway.limits import READ_IDS
from seamark.protocol.events import is_event_id

SDK = Path(web_package.__file__).parent / "web" / "seamark.js"

FRAMES_MAX = 600
"""Frames a client may send in a minute: a session of the simulation lasts no longer."""

Fault = Callable[[dict[str, Any]], list[dict[str, Any]]]


class SimSocket(web.WebSocketResponse):
    """A socket that may be closed while it is read."""

    is_ended = False

    async def end(self, code: int, reason: str) -> None:
        """Write a close frame and go on reading until the client has answered it.

        `close` would close the transport at once. If the client has sent something meanwhile, that resets the connection,
        and the client sees 1006 instead of the code.
        """
        self.is_ended = True
        assert self._writer is not None
        with contextlib.suppress(ConnectionError):  # it was cut just now
            await self._writer.close(code, reason.encode())

    async def close(self, **options: Any) -> bool:
        return False if self.is_ended else await super().close(**options)


class SimSession:
    """One connected device."""

    def __init__(self, gateway: SimGateway, ws: SimSocket, hello: dict[str, Any]) -> None:
        self.gateway = gateway
        self.ws = ws
        self.hello = hello
        self.sent = 0
        self.frames = 0

    async def send(self, frame: dict[str, Any]) -> None:
        for one in self.gateway.fault(frame) if self.gateway.fault else [frame]:
            with contextlib.suppress(ConnectionError):  # it was cut just now
                await self.ws.send_str(json.dumps(one))

    async def record(self, seq: int, body: dict[str, Any]) -> None:
        await self.send({"op": "record", "prev": self.sent, **self.gateway.at(seq), "record": body})
        self.sent = seq


class SimGateway:
    """One user's log behind `/v1/ws`.

    `fault`, if set, turns each frame into the frames that really go out. `answers` holds, for coming handshakes, a
    status or close code to refuse them with.
    """

    def __init__(self) -> None:
        self.epoch = "e1"
        self.log: list[tuple[int, dict[str, Any]]] = []
        self.first = 1
        self.sessions: list[SimSession] = []
        self.hellos: list[dict[str, Any]] = []
        self.said: list[dict[str, Any]] = []
        self.answers: list[int] = []
        self.refused_tokens: set[str] = set()
        self.stores_reads = True
        """What is read becomes a record of the log, as it does in a real gateway."""
        self.fault: Fault | None = None
        self.url = ""
        self.changed = asyncio.Condition()

    def at(self, seq: int) -> dict[str, Any]:
        """The members of a frame that say a position."""
        return {"cursor": f"{self.epoch}.{seq}", "seq": seq}

    async def publish(self, *bodies: dict[str, Any], gap: int = 1) -> None:
        """Append records and send them to whoever is connected."""
        for body in bodies:
            seq = (self.log[-1][0] if self.log else 0) + gap
            whole = {"id": f"r{seq}", "kind": "notification", "type": "demo.hello", **body}
            self.log.append((seq, whole))
            for session in list(self.sessions):
                await session.record(seq, whole)

    async def cut(self, code: int = 1006, reason: str = "") -> None:
        """End every session; 1006 without a close frame."""
        cut = self.sessions[:]
        for session in cut:
            if code == 1006:
                assert session.ws._req is not None
                if session.ws._req.transport is not None:  # else it has just ended by itself
                    session.ws._req.transport.abort()
            else:
                await session.ws.end(code, reason)
        if code != 1006:
            await self.until(lambda: not any(session in self.sessions for session in cut))

    async def until(self, condition: Callable[[], bool], seconds: float = 60.0) -> None:
        """Wait until something the clients do makes `condition` true."""
        async with asyncio.timeout(seconds), self.changed:
            await self.changed.wait_for(condition)

    async def _note(self) -> None:
        async with self.changed:
            self.changed.notify_all()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        answer = self.answers.pop(0) if self.answers else 0
        if 0 < answer < 1000:
            return web.Response(status=answer, headers={"Retry-After": "0"})
        ws = SimSocket(compress=False, protocols=("seamark.v1",))
        await ws.prepare(request)
        hello = await ws.receive_json()
        self.hellos.append(hello)
        if answer or hello["token"] in self.refused_tokens:
            await ws.close(code=answer or 4401)
            await self._note()
            return ws
        session = SimSession(self, ws, hello)
        await self._join(session)
        self.sessions.append(session)
        await self._note()
        try:
            await self._listen(session)
        finally:
            self.sessions.remove(session)
            await self._note()
        return ws

    async def _join(self, session: SimSession) -> None:
        cursor = session.hello.get("cursor")
        if session.hello.get("snapshot"):
            await self._snapshot(session)
            return
        head = self.log[-1][0] if self.log else 0
        epoch, _, seq = (cursor or "").rpartition(".")
        if cursor == "start" or (epoch == self.epoch and self.first - 1 <= int(seq) <= head):
            session.sent = self.first - 1 if cursor == "start" else int(seq)
            at = self.at(session.sent)
            await session.send({"op": "ready", "session": "s", **at, "resumed": True, "unread": None})
        else:
            reason = "new" if cursor is None else "epoch" if epoch != self.epoch else "trimmed"
            if reason == "trimmed" and int(seq) > head:
                reason = "future"
            session.sent = head if cursor is None else self.first - 1
            await session.send({"op": "ready", "session": "s", "cursor": None, "resumed": False, "reason": reason})
            at = self.at(session.sent)
            await session.send({"op": "reset", "reason": reason, **at, "unread": None, "inbox": []})
        for seq_, body in [one for one in self.log if one[0] > session.sent]:
            await session.record(seq_, body)
        await session.send({"op": "live", **self.at(session.sent)})

    async def _snapshot(self, session: SimSession) -> None:
        """Answer a `hello` that asks for one: the notifications, newest first, with what was read."""
        read = {id for _, body in self.log if body.get("kind") == "read" for id in body.get("ids", [])}
        rows = [body | {"seq": seq, "read": body["id"] in read} for seq, body in self.log if body.get("kind") != "read"]
        session.sent = self.log[-1][0] if self.log else 0
        count = sum(not row["read"] for row in rows)
        unread = {"count": count, "as_of": session.sent, "more": False, "categories": {}}
        at = self.at(session.sent)
        ready = {"op": "ready", "session": "s", "cursor": None, "resumed": False, "reason": "snapshot"}
        await session.send({**ready, "unread": unread})
        await session.send({"op": "reset", "reason": "snapshot", **at, "unread": unread, "inbox": rows[::-1]})
        await session.send({"op": "live", **at})

    async def _listen(self, session: SimSession) -> None:
        async for message in session.ws:
            if message.type is not aiohttp.WSMsgType.TEXT:
                break
            frame = json.loads(message.data)
            self.said.append(frame)
            session.frames += 1
            wrong = self._wrong(session, frame)
            if session.frames > FRAMES_MAX or wrong:
                await session.send(
                    {"op": "error", "code": "bad_frame" if wrong else "too_many_frames", "detail": wrong}
                )
                await session.ws.close(code=4400 if wrong else 4429)
                await self._note()
                break
            if frame["op"] == "read" and frame.get("up_to", self.epoch).partition(".")[0] != self.epoch:
                await session.send({"op": "error", "code": "stale_cursor", "detail": "", "id": frame["id"]})
            elif frame["op"] == "read" and self.stores_reads:
                up_to = int(frame["up_to"].rpartition(".")[2]) if "up_to" in frame else None
                await self.publish({"kind": "read", "ids": frame.get("ids", []), "up_to": up_to})
            if frame["op"] == "ping":
                await session.send({"op": "pong", **self.at(session.sent)})
            await self._note()

    def _wrong(self, session: SimSession, frame: dict[str, Any]) -> str:
        """Why a real gateway would take this for a bad frame; empty if it would not."""
        ids = frame.get("ids")
        if ids is not None and not (1 <= len(ids) <= READ_IDS and all(map(is_event_id, ids))):
            return "ids that are none, or too many"
        epoch, _, seq = (frame.get("cursor") or frame.get("up_to") or "").rpartition(".")
        if frame["op"] == "ack" and epoch != self.epoch:
            return "a cursor that was never sent"
        if epoch == self.epoch and int(seq) > session.sent:
            return "beyond the last frame sent"
        return ""

    def of(self, op: str) -> list[dict[str, Any]]:
        """What clients said with this `op`, without the ids of the frames."""
        return [{k: v for k, v in frame.items() if k != "id"} for frame in self.said if frame["op"] == op]

    async def refuse_last(self, op: str, code: str) -> None:
        """Answer what was said last with this `op` by an error."""
        id = [frame["id"] for frame in self.said if frame["op"] == op][-1]
        await self.sessions[0].send({"op": "error", "code": code, "detail": "later", "id": id})


async def blank(_: web.Request) -> web.Response:
    return web.Response(text="<!doctype html><title>test</title>", content_type="text/html")


async def no_stream(_: web.Request) -> web.Response:
    """A client that no WebSocket reached in time tries this; it must come back to a WebSocket, not give up."""
    return web.Response(status=503)


async def sdk(_: web.Request) -> web.FileResponse:
    return web.FileResponse(SDK, headers={"Content-Type": "text/javascript"})


@asynccontextmanager
async def sim_gateway() -> AsyncIterator[SimGateway]:
    """A running simulated gateway on a free port."""
    gateway = SimGateway()
    app = web.Application()
    app.router.add_get("/v1/ws", gateway._handle)
    app.router.add_get("/v1/stream", no_stream)
    app.router.add_get("/", blank)
    app.router.add_get("/seamark.js", sdk)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    gateway.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield gateway
    finally:
        await gateway.cut()
        await runner.cleanup()
