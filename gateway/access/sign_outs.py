"""Users who were signed out: of whom no token is believed that was issued before.

They stand in a bucket of their own, which every gateway holds whole: a gateway that was cut off learns what it missed when it is
back. While it is cut off it believes no token at all, as it cannot know who was signed out.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from typing import Final

import msgspec
import structlog

from engine.broker.jetstream import After, Broker, Stored
from engine.broker.refusals import is_overtaken
from engine.broker.tail import BucketTail
from engine.errors import ApiError, Unavailable
from engine.tasks import Tasks
from gateway.presence.limits import SIGN_OUTS_KEPT_SECONDS, SIGN_OUTS_OLD_SECONDS
from seamark.protocol.errors import InvalidToken
from seamark.protocol.subjects import SIGN_OUTS_BUCKET, decode_token, encode_token, encode_user

_log = structlog.get_logger("seamark.sign_outs")

FIRST_READ_SECONDS: Final = 5.0
"""How long a gateway that starts waits for what the bucket holds. Without it, it starts and believes no token yet."""

_RACES_MAX: Final = 10


class SignOut(msgspec.Struct):
    """What the bucket holds of a user. `until`: tokens issued up to then count for nothing, in Unix seconds."""

    until: float


class SignOuts:
    """The users who were signed out within the last 31 days.

    Attributes:
        on_sign_out: called with tenant, user and time of each that was not known before.
    """

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._tail = BucketTail(broker, SIGN_OUTS_BUCKET, self._add, self._forget)
        self._until: dict[tuple[str, str], float] = {}  # by tenant and user, in the order they were stored
        self._of_tenants: Counter[str] = Counter()
        self._tasks = Tasks()
        self.on_sign_out: list[Callable[[str, str, float], None]] = []

    async def start(self) -> None:
        """Follow the bucket from now on; returns when it was read, or after some seconds."""
        self._tasks.begin(self._tail.run(), "sign-outs")
        try:
            async with asyncio.timeout(FIRST_READ_SECONDS):
                await self._tail.read_up_to(0)
        except TimeoutError:
            _log.error("sign_outs_not_known", remedy=self._tail.remedy or f"look at the stream {self._tail.stream}")

    async def close(self) -> None:
        """Stop following."""
        await self._tasks.end()

    @property
    def age_seconds(self) -> float:
        """How long ago everything was known."""
        return self._tail.age_seconds

    @property
    def known(self) -> bool:
        """Whether enough is known to believe a token."""
        return self.age_seconds <= SIGN_OUTS_OLD_SECONDS

    def not_ready(self) -> list[str]:
        """Why no token is believed here; empty where they are."""
        if self.known:
            return []
        why = self._tail.remedy or f"the stream {self._tail.stream} cannot be read"
        return [f"it is not known who was signed out, so no token is believed: {why}"]

    def refuses(self, tenant: str, user: str, issued_at: float) -> bool:
        """Whether a token of a user, issued at this Unix time, counts for nothing."""
        until = self._until.get((tenant, user))
        return until is not None and issued_at <= until

    def holds(self, tenant: str, user: str) -> bool:
        """Whether a user is kept as signed out."""
        return (tenant, user) in self._until

    def of_tenant(self, tenant: str) -> int:
        """How many users of a tenant are kept as signed out."""
        return self._of_tenants[tenant]

    async def read_up_to(self, seq: int) -> None:
        """Return once everything up to this place in the bucket is obeyed here; the caller sets the deadline."""
        await self._tail.read_up_to(seq)

    async def sign_out(self, tenant: str, user: str, until: float) -> int:
        """Store that tokens of a user that were issued up to `until` count for nothing; returns its place in the bucket.

        Raises:
            BrokerError: as `Broker.append`; it may be stored again.
        """
        key = f"$KV.{SIGN_OUTS_BUCKET}.{encode_token(tenant)}.{encode_user(user)}"
        for _ in range(_RACES_MAX):
            last = await self._broker.leader_last(f"KV_{SIGN_OUTS_BUCKET}", key)
            before = _decode(last) if last is not None else 0.0
            body = msgspec.json.encode(SignOut(max(until, before)))  # never takes back what is signed out already
            try:
                after = After(f"KV_{SIGN_OUTS_BUCKET}", last.seq if last is not None else 0)
                return (await self._broker.append(key, body, after=after, budget_seconds=5.0)).seq
            except ApiError as error:
                if not is_overtaken(error):
                    raise
        raise Unavailable("others keep signing this user out")

    def _add(self, key: str, stored: Stored) -> None:
        try:
            tenant, user = map(decode_token, key.split("."))
        except (InvalidToken, ValueError):
            _log.error(
                "sign_out_of_nobody", seq=stored.seq
            )  # not by a gateway; it must not end what follows the bucket
            return
        until, before = _decode(stored), self._until.pop((tenant, user), None)
        self._of_tenants[tenant] += before is None
        self._until[tenant, user] = until
        if before is None or until > before:
            for callback in self.on_sign_out:
                callback(tenant, user, until)
        self._let_go()

    def _let_go(self) -> None:
        """What the bucket no longer holds: a token that is so old is not believed in any case."""
        gone = time.time() - SIGN_OUTS_KEPT_SECONDS
        while self._until and self._until[whose := next(iter(self._until))] < gone:
            del self._until[whose]
            self._of_tenants[whose[0]] -= 1

    def _forget(self) -> None:
        self._until.clear()
        self._of_tenants.clear()


def _decode(stored: Stored) -> float:
    """Until when tokens count for nothing; until now, where it cannot be read: rather one sign-in too many."""
    try:
        return msgspec.json.decode(stored.payload, type=SignOut).until
    except msgspec.DecodeError:
        _log.error("sign_out_not_read", seq=stored.seq)
        return time.time()
