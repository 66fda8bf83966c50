"""Access tokens of a Google service account (RFC 7523): asked for once for all who wait, and renewed before they end."""

from __future__ import annotations

import asyncio
import time
from typing import Any, Final
from urllib.parse import urlencode

import aiohttp
import jwt
import msgspec

from engine.channels.channel import Outcome, OutcomeKind
from engine.channels.exchange import Silence, exchange
from engine.channels.push.answers import UNREADABLE
from engine.errors import InvalidSetting

SCOPE: Final = "https://www.googleapis.com/auth/firebase.messaging"

RENEW_SECONDS_BEFORE: Final = 300.0
"""A token that ends while a request with it is under way is refused."""

ASSERTION_SECONDS: Final = 3600
"""The longest that Google allows."""

REFUSED_SECONDS: Final = 10.0
"""For how long a failure is the answer to all who ask: else every send of a worker would ask again."""

REQUEST_SECONDS: Final = 10.0


class ServiceAccount(msgspec.Struct, frozen=True):
    """What is in the file that Google gives for a service account."""

    project_id: str
    client_email: str
    private_key: str
    private_key_id: str = ""
    token_uri: str = "https://oauth2.googleapis.com/token"

    def __repr__(self) -> str:
        """Without the key."""
        return f"ServiceAccount(project_id={self.project_id!r})"


def service_account(setting: str, text: str) -> ServiceAccount:
    """The account in a file of Google's.

    Raises:
        InvalidSetting: names `setting`; nothing of the file is repeated.
    """
    try:
        account = msgspec.json.decode(text, type=ServiceAccount)
        jwt.encode({}, account.private_key, algorithm="RS256")
    except Exception as error:  # PyJWT and cryptography raise what they like for what is no key
        raise InvalidSetting(
            f"{setting} is not the JSON file of a service account: create a key of the type JSON for it in Google's console"
        ) from error
    return account


class NoToken(Exception):
    """There is no access token. `kind`, `code`: what a send has come to by that."""

    def __init__(self, kind: OutcomeKind, code: str) -> None:
        super().__init__(code)
        self.kind = kind
        self.code = code

    def outcome(self, provider: str) -> Outcome:
        """What a send without a token has come to: nothing has left."""
        return Outcome(kind=self.kind, provider=provider, code=self.code, scope="key")


class _Granted(msgspec.Struct):
    access_token: str
    expires_in: float = 3600.0


class AccessTokens:
    """The access token of one account.

    Args:
        account: whose. http: a session of `open_http`, which its owner closes.
    """

    def __init__(self, account: ServiceAccount, http: aiohttp.ClientSession) -> None:
        self._account = account
        self._http = http
        self._token = ""
        self._issued_at = 0.0
        self._ends_at = 0.0
        self._renew_at = 0.0
        self._failure: NoToken | None = None
        self._asking: asyncio.Task[None] | None = None

    async def get(self) -> str:
        """The token. It is renewed while it still counts, and a failure to renew it hurts nobody until it has ended.

        Raises:
            NoToken: with what that means for the send.
        """
        now = time.monotonic()
        if now >= self._renew_at:
            if self._asking is None:
                self._asking = asyncio.create_task(self._ask(), name="oauth-token")
                self._asking.add_done_callback(self._asked)
            # Whoever is cancelled must not take the token from the others who wait for it.
            await asyncio.shield(self._asking)
        if time.monotonic() < self._ends_at:
            return self._token
        assert self._failure is not None, "asking ends with a token or a failure"
        raise self._failure

    def refused(self, token: str) -> bool:
        """Drop a token that FCM does not take; whether another one may be had. False: it was new, so the account is at fault."""
        if token == self._token:
            if time.monotonic() - self._issued_at < RENEW_SECONDS_BEFORE:
                return False
            self._ends_at = self._renew_at = 0.0
        return True

    async def close(self) -> None:
        """Stop asking."""
        if self._asking is not None:
            self._asking.cancel()
            await asyncio.wait([self._asking])

    def _asked(self, task: asyncio.Task[None]) -> None:
        self._asking = None

    async def _ask(self) -> None:
        try:
            granted = await self._granted()
        except NoToken as failure:
            self._failure = failure
            self._renew_at = time.monotonic() + REFUSED_SECONDS
            return
        now = time.monotonic()
        self._token, self._issued_at, self._failure = granted.access_token, now, None
        self._ends_at = now + granted.expires_in
        self._renew_at = now + max(granted.expires_in - RENEW_SECONDS_BEFORE, granted.expires_in / 2)

    async def _granted(self) -> _Granted:
        account, now = self._account, int(time.time())
        claims: dict[str, Any] = {"iss": account.client_email, "scope": SCOPE, "aud": account.token_uri}
        claims |= {"iat": now, "exp": now + ASSERTION_SECONDS}
        headers = {"kid": account.private_key_id} if account.private_key_id else None
        assertion = jwt.encode(claims, account.private_key, algorithm="RS256", headers=headers)
        form = urlencode({"grant_type": "urn:ietf:params:oauth:grant-type:jwt-bearer", "assertion": assertion})
        answer = await exchange(
            self._http,
            account.token_uri,
            headers={"Content-Type": "application/x-www-form-urlencoded"},
            body=form.encode(),
            deadline_seconds=REQUEST_SECONDS,
        )
        if isinstance(answer, Silence):
            raise NoToken("transient", f"oauth/{answer.why}")
        if answer.status in (429, 408) or answer.status >= 500:
            raise NoToken("transient", f"oauth/{answer.status}")
        try:
            if answer.status == 200:
                return msgspec.json.decode(answer.body, type=_Granted)
        except UNREADABLE as error:
            raise NoToken("transient", "oauth/malformed") from error
        raise NoToken("config", f"oauth/{answer.status}")
