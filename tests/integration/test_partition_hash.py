"""Our partition of a key is the server's: both compute it, and a difference would split a user's log."""

from hypothesis import given, settings
from hypothesis import strategies as st

from chaos.load import whole_stream
from engine.broker.jetstream import Broker
from ops.dev.servers import NatsServer
from seamark.protocol.subjects import encode_token, event_subject, parse_stored_event, partition_of
from tests.support.logs import connected

NAMES = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=10)


async def partitioned(broker: Broker, partitions: int) -> None:
    await broker.api(
        f"STREAM.CREATE.HASH-{partitions}",
        {
            "name": f"HASH-{partitions}",
            "subjects": [f"events{partitions}.*.*.>"],
            "storage": "memory",
            "subject_transform": {
                "src": f"events{partitions}.*.*.>",
                "dest": f"ev{partitions}.{{{{partition({partitions},1,2)}}}}.{{{{wildcard(1)}}}}.{{{{wildcard(2)}}}}.>",
            },
            "allow_direct": True,
        },
    )


async def test_every_name_is_in_the_partition_where_the_server_puts_it(nats_server: NatsServer) -> None:
    pairs = [("default", f"user{i}") for i in range(300)] + [("a", "bc"), ("ab", "c"), ("x" * 128, "y" * 128)]

    @settings(max_examples=400, database=None)
    @given(st.tuples(NAMES, NAMES))
    def whatever_names_can_hold(pair: tuple[str, str]) -> None:
        pairs.append(pair)

    whatever_names_can_hold()
    async with connected(nats_server.url) as broker:
        for partitions in (1, 4, 16, 31):
            await partitioned(broker, partitions)
            for tenant, key in pairs:
                subject = event_subject(tenant, key, "demo.hello").replace("events.", f"events{partitions}.", 1)
                broker.publish(subject, b"")
            pairs.append(("last", "one"))
            await broker.append(
                event_subject("last", "one", "demo.hello").replace("events", f"events{partitions}", 1), b""
            )
            stored = await whole_stream(broker, f"HASH-{partitions}", f"ev{partitions}.>")
            assert len(stored) == len(pairs)
            for message, (tenant, key) in zip(stored, pairs, strict=True):
                at = parse_stored_event("ev." + message.subject.split(".", 1)[1])
                assert (at.tenant, at.key) == (tenant, key)
                assert at.partition == partition_of(encode_token(tenant), encode_token(key), partitions)
