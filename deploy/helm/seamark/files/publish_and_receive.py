"""What `helm test` runs: publishes one notification as a service does, and receives it as a device does.

Reads the settings that roles read, as NATS' user `publisher`; further SEAMARK_GATEWAY_URL, and either TEST_TOKEN_FILE, a token of
a user of the tenant `default`, or the shared secret by which tokens are signed.
"""

import asyncio
import os
import sys
import time
import uuid
from pathlib import Path

import jwt

from engine.settings import Settings, load_settings
from seamark import Publisher, Record, connect

SECONDS = 60.0
"""From the start to the notification: pods that have just become ready may need some of it."""

USER = "helm-test"


def token_of(settings: Settings) -> str:
    """The user's token: the one that is mounted, or one for five minutes."""
    if path := os.environ.get("TEST_TOKEN_FILE"):
        return Path(path).read_text(encoding="utf-8").strip()
    if settings.jwt_secret is None:
        sys.exit("give a user's token: test.tokenSecret, or auth.jwtSecret to sign one")
    given = {"iss": settings.jwt_issuer, "aud": settings.jwt_audience}
    claims = {"sub": USER, "tenant": "default", "exp": int(time.time()) + 300}
    claims |= {name: value for name, value in given.items() if value}
    return jwt.encode(claims, settings.jwt_secret.reveal(), algorithm="HS256")


async def main() -> None:
    """Publish, then follow the user's log until the notification is there."""
    settings = load_settings()
    token = token_of(settings)
    user = jwt.decode(token, options={"verify_signature": False})["sub"]
    nats, event, began = settings.nats("helm-test"), f"helm-test-{uuid.uuid4()}", time.monotonic()
    async with (
        Publisher(
            nats_url=nats.url, user=nats.user, password=nats.password, inbox_prefix=nats.inbox_prefix
        ) as publisher,
        connect(os.environ["SEAMARK_GATEWAY_URL"], token=token, device="helm-test", cursor="start") as items,
    ):
        await publisher.publish(to=[user], type="helm.test", id=event)
        async for item in items:
            if isinstance(item, Record) and item.id == event:
                print(f"{event}: published and received within {time.monotonic() - began:.2f} s")
                return


async def within_its_time() -> None:
    """Whatever it waits for, the test ends."""
    try:
        async with asyncio.timeout(SECONDS):
            await main()
    except TimeoutError:
        sys.exit(f"not received within {SECONDS:g} s: look at /readyz of the roles")


asyncio.run(within_its_time())
