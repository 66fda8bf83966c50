"""An SMTP server that accepts mail for anybody and delivers it to nobody: a real one (aiosmtpd), which fails where it is told to.

What it accepted is in its log, also where the sender never learned of it.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
import struct
from collections import deque
from collections.abc import Iterable, Mapping
from email import message_from_bytes, policy
from email.message import EmailMessage
from typing import Any, Final, Literal, Self, cast

import msgspec
from aiosmtpd.smtp import SMTP, AuthResult, Envelope, LoginPassword, Session

from ops.dev.providers.acceptlog import AcceptLog
from ops.dev.providers.faults import Answers, Fault, Faults, Hangs, Late, NoTls, Resets

Stage = Literal["connect", "auth", "mail", "rcpt", "data", "end"]
"""As `engine.channels.email.replies` has them."""

_RESET_AT_CLOSE: Final = struct.pack("ii", 1, 0)


class Scripted(msgspec.Struct, frozen=True):
    """A fault of one stage of a mail, for one recipient or for all.

    `accepts` of the fault counts at `end` only: before it there is nothing to accept.
    """

    stage: Stage
    fault: Fault
    recipient: str = ""


class SmtpSimulator:
    """Use it as `async with`. Faults of `faults` meet a mail at its end, those of `script` at any stage.

    Args:
        host, port: where it listens; 0: a free port.
        tls: its certificate; none: it knows no TLS.
        implicit: TLS from the first byte, instead of STARTTLS.
        accounts: passwords by user; with them nobody sends without a login.
    """

    def __init__(
        self,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        tls: ssl.SSLContext | None = None,
        implicit: bool = False,
        accounts: Mapping[str, str] | None = None,
    ) -> None:
        self.log = AcceptLog()
        self.faults = Faults()
        self.connections = 0
        """How many were ever opened."""
        self._script: deque[Scripted] = deque()
        self._host, self._port, self._tls = host, port, tls
        self.implicit = implicit
        self._accounts = dict(accounts or {})
        self._server: asyncio.Server | None = None
        self._open: set[_Connection] = set()

    @property
    def port(self) -> int:
        """Where it listens."""
        return self._port

    def script(self, faults: Iterable[Scripted]) -> None:
        """The next mails meet these, in this order: each once, by the first mail that has its stage and its recipient."""
        self._script.extend(faults)

    async def start(self) -> None:
        """Listen."""
        logging.getLogger("mail.log").setLevel(logging.ERROR)  # aiosmtpd warns of a name that it uses itself
        loop = asyncio.get_running_loop()
        tls = self._tls if self.implicit else None
        self._server = await loop.create_server(lambda: _Connection(self), self._host, self._port, ssl=tls)
        self._port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Stop listening and cut off what is under way. It can start again, at the same port."""
        if self._server is not None:
            self._server.close()
            for connection in list(self._open):
                connection.cut()
            await self._server.wait_closed()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    def options(self) -> dict[str, Any]:
        """Of aiosmtpd's server."""
        return {
            "handler": _Handler(self),
            "hostname": "simulator",
            "enable_SMTPUTF8": False,
            "tls_context": None if self.implicit else self._tls,
            "require_starttls": self._tls is not None and not self.implicit,
            "authenticator": self._is_ours,
            "auth_required": bool(self._accounts),
        }

    def next(self, stage: Stage, recipient: str = "") -> Fault | None:
        """What a mail meets that comes to this stage."""
        if self._script and self._script[0].stage == stage and self._script[0].recipient in ("", recipient):
            return self._script.popleft().fault
        return self.faults.next() if stage == "end" else None

    def accept(self, envelope: Envelope) -> str:
        """Note a mail as taken; its id."""
        raw = envelope.original_content or b""
        for recipient in envelope.rcpt_tos:
            id = f"S{self.log.accepted:08d}"
            shown = shown_of(raw)
            self.log.add(
                id=id,
                channel="email",
                to=recipient,
                key=shown["message_id"],
                shown=shown,
                raw={"from": envelope.mail_from or "", "message": raw.decode("ascii", "replace")},
            )
        return f"S{self.log.accepted - 1:08d}"

    def _is_ours(self, _server: Any, _session: Any, _envelope: Any, mechanism: str, data: Any) -> AuthResult:
        known = isinstance(data, LoginPassword) and self._accounts.get(
            data.login.decode("utf-8", "replace")
        ) == data.password.decode("utf-8", "replace")
        return AuthResult(success=known, handled=False, message=None if known else "535 5.7.8 Authentication failed")


def shown_of(raw: bytes) -> dict[str, Any]:
    """What a mail program shows of a message, and its headers."""
    message = message_from_bytes(raw, policy=policy.default)
    assert isinstance(message, EmailMessage)
    bodies = {kind: message.get_body((kind,)) for kind in ("plain", "html")}
    texts = {kind: "" if body is None else body.get_content() for kind, body in bodies.items()}
    return {
        "subject": str(message["subject"] or ""),
        "from": str(message["from"] or ""),
        "to": str(message["to"] or ""),
        "text": texts["plain"],
        "html": texts["html"],
        "message_id": str(message["message-id"] or "").strip(),
        "headers": {name: str(value) for name, value in message.items()},
    }


class _Handler:
    """Answers of aiosmtpd's server where there is no fault."""

    def __init__(self, simulator: SmtpSimulator) -> None:
        self._simulator = simulator

    async def handle_DATA(self, server: _Connection, _session: Session, envelope: Envelope) -> str:  # noqa: N802
        fault = self._simulator.next("end", envelope.rcpt_tos[0])
        if isinstance(fault, (Hangs, Resets)) and fault.accepts:
            self._simulator.accept(envelope)
        if fault is not None and (said := await server.meet(fault)):
            return said
        return f"250 2.0.0 Ok: queued as {self._simulator.accept(envelope)}"


class _Connection(SMTP):
    """One connection, at which faults happen before the command they are for."""

    def __init__(self, simulator: SmtpSimulator) -> None:
        super().__init__(**simulator.options())
        self._simulator = simulator
        self._simulator.connections += 1
        # aiosmtpd does not see that a connection was encrypted from its first byte, and warns of whoever says so.
        self._auth_require_tls = not simulator.implicit

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._simulator._open.add(self)  # noqa: SLF001 - one thing in two classes, as aiosmtpd wants a protocol of its own
        super().connection_made(transport)

    def connection_lost(self, error: Exception | None) -> None:
        self._simulator._open.discard(self)  # noqa: SLF001
        super().connection_lost(error)

    def cut(self) -> None:
        """Break the connection off with RST, as when a machine dies."""
        if self.transport is not None and not self.transport.is_closing():
            raw = self.transport.get_extra_info("socket")
            if raw is not None:
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_AT_CLOSE)
            cast("asyncio.Transport", self.transport).abort()

    async def meet(self, fault: Fault) -> str:
        """Do what a fault says; what is left to be said, "" for nothing."""
        match fault:
            case Answers():
                return f"{fault.status} {fault.text}".replace("\n", f"\r\n{fault.status} ")
            case Hangs():
                await asyncio.Event().wait()  # until the connection ends, which cancels this
            case Resets() | NoTls():
                self.cut()
                await asyncio.Event().wait()
            case Late(seconds=seconds):
                await asyncio.sleep(seconds)
            case _:
                pass
        return ""

    async def _faulty(self, stage: Stage, recipient: str = "") -> bool:
        """Whether a fault has already answered."""
        fault = self._simulator.next(stage, recipient)
        if fault is None or not (said := await self.meet(fault)):
            return False
        await self.push(said)
        if said.startswith("421"):
            self._writer.close()
        return True

    async def _handle_client(self) -> None:
        if await self._faulty("connect"):
            self._writer.close()
            return
        await super()._handle_client()

    async def smtp_AUTH(self, arg: str) -> None:  # noqa: N802
        if not await self._faulty("auth"):
            await super().smtp_AUTH(arg)

    async def smtp_MAIL(self, arg: str | None) -> None:  # noqa: N802
        if not await self._faulty("mail"):
            await super().smtp_MAIL(arg)

    async def smtp_RCPT(self, arg: str | None) -> None:  # noqa: N802
        if not await self._faulty("rcpt", (arg or "").partition("<")[2].partition(">")[0]):
            await super().smtp_RCPT(arg)

    async def smtp_DATA(self, arg: str) -> None:  # noqa: N802
        recipients = self.envelope.rcpt_tos if self.envelope is not None else []
        if not await self._faulty("data", recipients[0] if recipients else ""):
            await super().smtp_DATA(arg)
