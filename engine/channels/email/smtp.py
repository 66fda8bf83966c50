"""Mail by SMTP, to a relay that is ours or a provider's. One recipient per transaction; connections are used again.

Until the final dot has been sent, nothing was handed over, and whatever breaks can be tried again or elsewhere. From then on
only a reply tells whether the relay has the mail (RFC 5321, 6.1): without one it is ambiguous, never "failed".
"""

from __future__ import annotations

import asyncio
import math
import re
import ssl
import time
from contextlib import suppress
from typing import Final, Literal

import aiosmtplib
import msgspec

from engine.channels.channel import Outcome
from engine.channels.email.message import BadAddress, Mail, ascii_address, to_bytes
from engine.channels.email.provider import judged
from engine.channels.email.replies import Stage, classify, parse
from engine.channels.verdicts import PROVEN_SECONDS
from engine.settings import Secret

CONNECT_SECONDS: Final = 5.0
"""For a connection with TLS and login: a relay that is away must leave time for the next one."""

COMMAND_SECONDS: Final = 10.0
"""For the reply to MAIL, RCPT and DATA. To the text it is waited for as long as the deadline allows: giving up there makes
repetitions."""

CONNECTIONS_MAX: Final = 10
"""To one relay from one process: providers allow 10 to 20. Further mails wait, within their deadline."""

IDLE_SECONDS: Final = 10.0
"""A connection that has waited longer is not used again: relays close theirs from 10 s on, and may do it while we write."""

MAILS_PER_CONNECTION: Final = 100
"""What Postfix allows by default (`smtpd_client_message_rate_limit` aside), and many others."""

_LOOPBACK: Final = ("localhost", "127.0.0.1", "::1")
_QUEUED: Final = re.compile(
    r"(?:queued as |\bid=|^(?:2\.\d\.\d )?ok:? (?!queued|id=))<?([A-Za-z0-9][A-Za-z0-9._-]{5,99})", re.IGNORECASE
)
"""How Postfix, Exim and Amazon name a mail that they have taken."""

_DOT: Final = re.compile(rb"(?m)^\.")


class MailRelay(msgspec.Struct, frozen=True, kw_only=True):
    """How a relay is reached.

    Args:
        name: as the configuration has it, and outcomes.
        tls: `starttls`, or `implicit` (port 465), its certificate checked either way; `none` for this machine only.
        hello: our name, as EHLO says it.
    """

    name: str
    host: str
    port: int
    tls: Literal["starttls", "implicit", "none"] = "starttls"
    username: str = ""
    password: Secret | None = None
    hello: str = "localhost"

    def __post_init__(self) -> None:
        """Raise ValueError where the members do not go together."""
        if self.tls == "none" and self.host not in _LOOPBACK:
            raise ValueError("`tls`: mail leaves this machine encrypted only; say starttls or implicit")
        if bool(self.username) != (self.password is not None):
            raise ValueError("`username` and `password` go together: leave out both, or neither")


class _Course:
    """How far a mail has come."""

    def __init__(self) -> None:
        self.begun = False
        self.stage: Stage = "connect"


class _Idle:
    """A connection that waits for its next mail."""

    def __init__(self, client: aiosmtplib.SMTP, mails: int, since: float) -> None:
        self.client = client
        self.mails = mails
        self.since = since


class SmtpProvider:
    """A mail relay as a provider. It belongs to one event loop.

    Args:
        relay: which.
        tls: whom to trust; none: the authorities of the system.
    """

    def __init__(self, relay: MailRelay, tls: ssl.SSLContext | None = None) -> None:
        self.name = relay.name
        self._relay = relay
        self._idle: list[_Idle] = []
        self._taken_at = -math.inf
        self._room = asyncio.Semaphore(CONNECTIONS_MAX)
        self._tls = None if relay.tls == "none" else tls or ssl.create_default_context()

    async def send(self, mail: Mail, recipient: str, *, deadline_seconds: float) -> Outcome:
        """Hand a mail over."""
        try:
            address = ascii_address(recipient)
        except BadAddress:
            return Outcome(kind="permanent", provider=self.name, code="address")
        raw, course = to_bytes(mail, address), _Course()
        try:
            async with asyncio.timeout(deadline_seconds), self._room:
                course.begun = True
                return await self._send(mail.envelope_from, address, raw, course)
        except TimeoutError:
            if not course.begun:
                return Outcome(kind="transient", provider=self.name, code="busy", begun=False)
            return self._lost(course, "timeout")

    async def close(self) -> None:
        """Take leave of the relay; of one that does not answer, without its consent."""
        idle, self._idle = self._idle, []
        for one in idle:
            with suppress(aiosmtplib.SMTPException, OSError):
                await one.client.quit(timeout=1.0)
            one.client.close()

    async def _send(self, sender: str, recipient: str, raw: bytes, course: _Course) -> Outcome:
        one = self._take()
        if one is not None:
            course.stage = "mail"
            try:
                return await self._through(one, sender, recipient, raw, course)
            except _Stale:
                pass  # closed while it waited; nothing was handed over
        course.stage = "connect"
        try:
            client = await self._connected(course)
        except aiosmtplib.SMTPResponseException as refused:
            return self._refused(refused, course)
        except (aiosmtplib.SMTPException, OSError) as error:
            return self._lost(course, _kind_of(error))
        return await self._through(_Idle(client, 0, 0.0), sender, recipient, raw, course)

    def _take(self) -> _Idle | None:
        while self._idle:
            one = self._idle.pop()
            if one.client.is_connected and time.monotonic() - one.since < IDLE_SECONDS:
                return one
            one.client.close()
        return None

    async def _connected(self, course: _Course) -> aiosmtplib.SMTP:
        relay = self._relay
        client = aiosmtplib.SMTP(
            hostname=relay.host,
            port=relay.port,
            local_hostname=relay.hello,
            timeout=CONNECT_SECONDS,
            use_tls=relay.tls == "implicit",
            start_tls=relay.tls == "starttls",
            tls_context=self._tls,
        )
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                await client.connect()
                await client.ehlo()
                if relay.password is not None:
                    course.stage = "auth"
                    await client.login(relay.username, relay.password.reveal())
        except BaseException:
            client.close()
            raise
        return client

    async def _through(self, one: _Idle, sender: str, recipient: str, raw: bytes, course: _Course) -> Outcome:
        """One transaction on a connection, which is kept if it is still good."""
        course.stage, used, keep = "mail", one.mails > 0, False
        try:
            outcome = await self._transaction(one.client, sender, recipient, raw, course)
            keep = True
        except aiosmtplib.SMTPResponseException as refused:
            outcome = self._refused(refused, course)
            keep = one.client.is_connected and refused.code not in (-1, 421) and await _reset(one.client, course)
        except (aiosmtplib.SMTPException, OSError) as error:
            if used and course.stage == "mail":
                raise _Stale from error
            outcome = self._lost(course, _kind_of(error))
        finally:
            one.mails += 1
            if keep and one.mails < MAILS_PER_CONNECTION:
                self._idle.append(_Idle(one.client, one.mails, time.monotonic()))
            else:
                one.client.close()
        return outcome

    async def _transaction(
        self, client: aiosmtplib.SMTP, sender: str, recipient: str, raw: bytes, course: _Course
    ) -> Outcome:
        await client.mail(sender, timeout=COMMAND_SECONDS)
        course.stage = "rcpt"
        await client.rcpt(recipient, timeout=COMMAND_SECONDS)
        course.stage = "data"
        reply = await client.execute_command(b"DATA", timeout=COMMAND_SECONDS)
        if reply.code != aiosmtplib.SMTPStatus.start_input:
            raise aiosmtplib.SMTPDataError(reply.code, reply.message)
        protocol = client.protocol
        if protocol is None:
            raise aiosmtplib.SMTPServerDisconnected("closed after DATA")
        # `data()` of the library does both, and does not tell whether it was before or after the dot that something broke.
        course.stage = "end"
        protocol.write(_DOT.sub(b"..", raw) + b".\r\n")
        # A deadline of its own: below Python 3.12 the library may have lost the cancellation of the one around it.
        async with asyncio.timeout(COMMAND_SECONDS):
            reply = await protocol.read_response()
        if reply.code != aiosmtplib.SMTPStatus.completed:
            raise aiosmtplib.SMTPDataError(reply.code, reply.message)
        self._taken_at = time.monotonic()
        queued = _QUEUED.search(reply.message)
        return Outcome(kind="ok", provider=self.name, code="250", provider_id=queued[1] if queued else "")

    def _refused(self, refused: aiosmtplib.SMTPResponseException, course: _Course) -> Outcome:
        if not 200 <= refused.code <= 599:
            return self._lost(course, "garbled")
        outcome = classify(parse(refused.code, refused.message), course.stage)
        away = outcome.kind == "transient" and (course.stage in ("connect", "auth") or refused.code == 421)
        outcome = judged(msgspec.structs.replace(outcome, provider=self.name, elsewhere=away))
        proven = time.monotonic() - self._taken_at < PROVEN_SECONDS
        if outcome.kind == "config" and course.stage in ("rcpt", "data", "end") and proven:
            # A relay that asks the recipient's server first passes on what that says: "relay access denied" is its own fault.
            return msgspec.structs.replace(outcome, scope="target", alarm=True)
        return outcome

    def _lost(self, course: _Course, how: str) -> Outcome:
        """No reply has come."""
        code = f"{course.stage}/{how}"
        if course.stage == "end":
            return Outcome(kind="ambiguous", provider=self.name, code=code)
        return Outcome(kind="transient", provider=self.name, code=code, elsewhere=True)


class _Stale(Exception):
    """The relay has closed a connection that waited."""


async def _reset(client: aiosmtplib.SMTP, course: _Course) -> bool:
    """Have the relay forget a transaction it has refused. Whether it did."""
    if course.stage == "end":
        return True  # it is over by itself
    try:
        await client.rset(timeout=COMMAND_SECONDS)
    except (aiosmtplib.SMTPException, OSError):
        return False
    return True


def _kind_of(error: Exception) -> str:
    """A word for what broke: the text of an error may repeat an address."""
    causes = (error, error.__cause__)
    if any(isinstance(one, ssl.SSLError) for one in causes):
        return "tls"
    if type(error) is aiosmtplib.SMTPException:
        return "unsupported"  # STARTTLS or AUTH
    if any(isinstance(one, TimeoutError) for one in causes):
        return "timeout"
    if any(isinstance(one, ConnectionRefusedError) for one in causes):
        return "refused"
    return "closed"
