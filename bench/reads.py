"""Questions to the broker, counted as they pass: how many reads sessions cost."""

from collections import Counter

from engine.broker.jetstream import Broker

_KINDS = {
    b"$JS.API.DIRECT.GET.": "direct_get",
    b"$JS.API.STREAM.MSG.GET.": "leader_get",
    b"$JS.API.STREAM.INFO.": "stream_info",
}


class Reads:
    """Counts requests by kind from `ready` on. The count itself costs the broker one more delivery per request."""

    def __init__(self, broker: Broker) -> None:
        self.counts: Counter[str] = Counter()
        self._subscriptions = [broker.subscribe(prefix.decode() + ">", self._on_request) for prefix in _KINDS]

    def _on_request(self, subject: bytes, reply: bytes, headers: bytes, payload: bytes) -> None:
        for prefix, kind in _KINDS.items():
            if subject.startswith(prefix):
                self.counts[kind] += 1

    async def ready(self) -> None:
        await self._subscriptions[-1].confirmed()

    def close(self) -> None:
        for subscription in self._subscriptions:
            subscription.unsubscribe()
