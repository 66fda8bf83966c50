"""What a gateway asks of all gateways, itself included, and does when it is asked. Nothing of it is stored anywhere.

Everyone who asks names by whom it was not answered, and whether it can know of all: so a part of the truth never passes for the
whole. Lost messages and gateways that are cut off are found in `silent`.
"""

from __future__ import annotations

import asyncio
import random
import secrets
import time
from typing import Final, Literal, NamedTuple

import msgspec
import structlog

from engine.broker.jetstream import Broker, Subscription
from engine.errors import BrokerError
from engine.tasks import Tasks
from gateway.access.sign_outs import SignOuts
from gateway.limits import DRAIN_SPREAD_MS
from gateway.presence.limits import ALONE_SECONDS, ANSWER_SECONDS, BEAT_SECONDS, OBEY_SECONDS
from gateway.presence.roll import Roll
from gateway.session.registry import Member, Sessions
from seamark.protocol.close_codes import UNAUTHENTICATED

_log = structlog.get_logger("seamark.gateways")

HERE: Final = "gateways.here"
ASK: Final = "gateways.ask"
ANSWER: Final = "gateways.answer"

_LEAVING: Final = b"leaving"


class Connected(msgspec.Struct, frozen=True):
    """A session of a user.

    Attributes:
        id: what it is ended by.
        carrier: `ws`, `sse`, or `poll`, which lasts for one request.
        gateway: the process it is connected to.
        silent_seconds: how long ago its client last showed life.
    """

    id: str
    device: str
    carrier: str
    gateway: str
    silent_seconds: float


class Question(msgspec.Struct, frozen=True, omit_defaults=True):
    """What all gateways are asked.

    Args:
        what: `sessions`: which ones a user has; `end`: end them; `signed_out`: obey the bucket up to `seq`, then as `sessions`.
        session: end only this one.
    """

    id: str
    asker: str
    what: Literal["sessions", "end", "signed_out"]
    tenant: str
    user: str
    session: str | None = None
    seq: int = 0


class Answer(msgspec.Struct, frozen=True):
    """What one gateway has, or what it has ended."""

    id: str
    gateway: str
    sessions: tuple[Connected, ...]


class Gathered(NamedTuple):
    """What was answered.

    Attributes:
        sessions: all of them, as far as was answered.
        silent: gateways that have not answered in time.
        complete: all gateways that may have sessions have answered.
    """

    sessions: list[Connected]
    silent: list[str]
    complete: bool


class _Asking:
    def __init__(self, missing: set[str]) -> None:
        self.missing = missing
        self.answers: dict[str, Answer] = {}
        self.all_there = asyncio.Event()

    def take(self, answer: Answer) -> None:
        self.answers[answer.gateway] = answer
        self.missing.discard(answer.gateway)
        if not self.missing:
            self.all_there.set()


class Gateways:
    """This gateway among the others.

    Args:
        sessions: its own.
        sign_outs: as it knows them. By them it also knows that it is cut off.
    """

    def __init__(self, broker: Broker, sessions: Sessions, sign_outs: SignOuts) -> None:
        self.id = secrets.token_hex(8)
        self._broker, self._sessions, self._sign_outs = broker, sessions, sign_outs
        self._roll = Roll(time.monotonic())
        self._asked: dict[str, _Asking] = {}
        self._subscriptions: list[Subscription] = []
        self._tasks = Tasks()
        self._decode_question = msgspec.json.Decoder(Question).decode
        self._decode_answer = msgspec.json.Decoder(Answer).decode

    def start(self) -> None:
        """Listen, and say from now on that this gateway is there."""
        self._subscriptions = [
            self._broker.subscribe(f"{HERE}.*", self._on_here),
            self._broker.subscribe(ASK, self._on_question),
            self._broker.subscribe(f"{ANSWER}.{self.id}", self._on_answer),
        ]
        self._broker.on_reconnect.append(self._on_reconnect)
        self._sign_outs.on_sign_out.append(self._end_signed_out)
        self._tasks.begin(self._beat(), "gateway-beat")

    async def close(self) -> None:
        """Say that this gateway leaves, which has ended its sessions."""
        await self._tasks.end()
        self._publish(f"{HERE}.{self.id}", _LEAVING)
        for subscription in self._subscriptions:
            subscription.unsubscribe()

    async def ask(
        self,
        what: Literal["sessions", "end", "signed_out"],
        tenant: str,
        user: str,
        *,
        session: str | None = None,
        seq: int = 0,
    ) -> Gathered:
        """Ask all gateways; answered when all have, or after a second.

        Raises:
            BrokerError: not connected.
        """
        question = Question(secrets.token_hex(8), self.id, what, tenant, user, session, seq)
        known = self._roll.known(time.monotonic()) | {self.id}
        asking = self._asked[question.id] = _Asking(set(known))
        try:
            self._broker.publish(ASK, msgspec.json.encode(question))
            async with asyncio.timeout(ANSWER_SECONDS):
                await asking.all_there.wait()
        except TimeoutError:
            _log.warning("gateways_silent", gateways=sorted(asking.missing))
        finally:
            del self._asked[question.id]
        sessions = [each for answer in asking.answers.values() for each in answer.sessions]
        silent = sorted(asking.missing)
        return Gathered(sessions, silent, not silent and self._roll.complete(time.monotonic()))

    # --- the others -----------------------------------------------------------------------------------------------------

    async def _beat(self) -> None:
        while True:
            self._publish(f"{HERE}.{self.id}", b"")
            self._end_if_alone()
            await asyncio.sleep(BEAT_SECONDS)

    def _end_if_alone(self) -> None:
        """Nobody counts on a gateway that has been cut off for long, and its sessions get nothing: they do better elsewhere."""
        if self._sign_outs.age_seconds > ALONE_SECONDS and len(self._sessions):
            sessions = self._sessions.everyone()
            _log.error("sessions_sent_away", why="cut off from the broker", sessions=len(sessions))
            for session in sessions:
                session.bye(random.randint(100, DRAIN_SPREAD_MS))

    def _on_here(self, subject: bytes, reply: bytes, headers: bytes, payload: bytes) -> None:
        gateway = subject.decode().rpartition(".")[2]
        if payload == _LEAVING:
            self._roll.left(gateway)
        else:
            self._roll.heard(gateway, time.monotonic())

    def _on_reconnect(self) -> None:
        self._roll.deaf(time.monotonic())

    # --- questions --------------------------------------------------------------------------------------------------------

    def _on_answer(self, subject: bytes, reply: bytes, headers: bytes, payload: bytes) -> None:
        try:
            answer = self._decode_answer(payload)
        except msgspec.DecodeError as error:
            _log.error("answer_not_read", why=str(error))
            return
        asking = self._asked.get(answer.id)
        if asking is not None:
            asking.take(answer)

    def _on_question(self, subject: bytes, reply: bytes, headers: bytes, payload: bytes) -> None:
        try:
            question = self._decode_question(payload)
        except msgspec.DecodeError as error:
            _log.error("question_not_read", why=str(error))  # of a newer version: who asks sees that there is no answer
            return
        if question.what == "signed_out":
            self._tasks.begin(self._obey(question), "obey-sign-out")
        else:
            self._answer(question, self._found(question))

    async def _obey(self, question: Question) -> None:
        """Answer once the bucket was read so far; then no session is left that it ends, and none can begin."""
        try:
            async with asyncio.timeout(OBEY_SECONDS):
                await self._sign_outs.read_up_to(question.seq)
        except TimeoutError:
            return  # who asks sees that there is no answer
        self._answer(question, self._found(question))

    def _answer(self, question: Question, found: list[Member]) -> None:
        now = asyncio.get_running_loop().time()
        told = tuple(
            Connected(each.id, each.device, each.carrier, self.id, round(now - each.heard_at, 1)) for each in found
        )
        if question.what == "end":
            for each in found:
                each.bye(random.randint(100, DRAIN_SPREAD_MS))
        self._publish(f"{ANSWER}.{question.asker}", msgspec.json.encode(Answer(question.id, self.id, told)))

    def _found(self, question: Question) -> list[Member]:
        mine = self._sessions.of_user(question.tenant, question.user)
        return [each for each in mine if question.session in (None, each.id)]

    def _end_signed_out(self, tenant: str, user: str, until: float) -> None:
        for session in self._sessions.of_user(tenant, user):
            if session.issued_at <= until:
                session.end(
                    UNAUTHENTICATED, "signed_out: the user was signed out; a token issued from now on is believed"
                )

    def _publish(self, subject: str, payload: bytes) -> None:
        try:
            self._broker.publish(subject, payload)
        except BrokerError as error:
            _log.debug("gateways_not_told", error=type(error).__name__)
