"""What a test sees of a connection to the broker: what a subject carried, and whether there is a connection at all."""

from engine.broker.jetstream import Broker
from engine.errors import Unanswered
from tests.support.logs import eventually


class Inbox:
    """Collects the payloads of a subject."""

    def __init__(self, broker: Broker, subject: str) -> None:
        self.payloads: list[bytes] = []
        self.subscription = broker.subscribe(subject, self._take)

    def _take(self, subject: bytes, reply: bytes, headers: bytes, payload: bytes) -> None:
        self.payloads.append(payload)

    async def got(self, payload: bytes) -> None:
        await eventually(lambda: payload in self.payloads)


async def lost(broker: Broker) -> None:
    await eventually(lambda: not broker.connected)


async def back(broker: Broker) -> None:
    """There is a connection, and the server has processed what was written on it."""

    async def flushed() -> bool:
        try:
            await broker.flush()
        except Unanswered:  # this connection was lost again, or the server is slow
            return False
        return True

    await eventually(flushed)
