"""A partition that is read without trouble is read straight through."""

from engine import metrics
from engine.broker.jetstream import Outgoing
from engine.topology import server as topology
from ops.dev.servers import NatsServer, Valkey
from seamark.protocol.subjects import dispatch_consumer
from tests.support.logs import PATIENT, PIN_KEPT_SECONDS, all_records, connected, dispatching, eventually

PARTITIONS = 4
EVENTS = 4_000


def count(name: str) -> float:
    """Of all dispatchers' partitions in this process: `resets` or `take_overs`."""
    found = (getattr(metrics.partition("EVENTS", dispatch_consumer(q)), name) for q in range(PARTITIONS))
    return sum(counter._value.get() for counter in found)


async def test_a_backlog_is_read_without_putting_the_reading_head_back(nats_server: NatsServer, valkey: Valkey) -> None:
    async with connected(nats_server.url) as broker:
        await topology.ensure(broker, "dev", overrides=PATIENT)
        body = b'{"id":"e%d","to":["user-%d"]}'
        events = [Outgoing(f"events.default.user-{i % 50}.demo.n", body % (i, i % 50)) for i in range(EVENTS)]
        for start in range(0, EVENTS, 1000):
            await broker.commit(events[start : start + 1000])
        resets, take_overs = count("resets"), count("take_overs")
        # A pause of this process costs no pin, and does not look like silence of the broker.
        async with dispatching(nats_server.url, valkey.url, pin_timeout_seconds=PIN_KEPT_SECONDS):

            async def done() -> bool:
                return len(await all_records(broker, PARTITIONS)) >= EVENTS

            await eventually(done, seconds=60)
    # One for each take-over: the pulls that follow end in order, with all they asked for. One that fails has none.
    assert count("take_overs") - take_overs >= PARTITIONS
    assert count("resets") - resets <= count("take_overs") - take_overs
