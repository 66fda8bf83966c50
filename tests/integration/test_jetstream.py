"""JetStream through the broker: appends that are stored once or say why not, batches whole or not at all, honest reads."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from engine.broker import jetstream, wire
from engine.broker.jetstream import After, Broker, Outgoing
from engine.errors import ApiError, Unanswered, Unavailable
from engine.limits import APPEND_BUDGET_SECONDS, BATCH_MESSAGES_MAX
from ops.dev.servers import NatsServer
from tests.support.backoff import TwoAttempts
from tests.support.logs import connected, eventually
from tests.support.network import bad_network


@pytest.fixture
async def broker(nats_server: NatsServer) -> AsyncIterator[Broker]:
    async with connected(nats_server.url) as connection:
        await make(connection)
        yield connection


async def make(broker: Broker, name: str = "S", **config: Any) -> None:
    base = {"name": name, "subjects": [f"{name.lower()}.>"], "storage": "file", "num_replicas": 1}
    base |= {"allow_direct": True, "allow_atomic": True, "discard": "new", "max_consumers": 8}
    await broker.api(f"STREAM.CREATE.{name}", base | config)


async def last_seq(broker: Broker, name: str = "S") -> int:
    return (await broker.stream(name)).last_seq


def expect(seq: int) -> bytes:
    return b"Nats-Expected-Last-Subject-Sequence: %d\r\n" % seq


@contextlib.asynccontextmanager
async def suspended(server: NatsServer) -> AsyncIterator[None]:
    server.suspend()
    try:
        yield
    finally:
        server.resume()


# --- append ------------------------------------------------------------------------------------------------------------------


async def test_an_append_is_stored_with_its_headers_and_says_where(broker: Broker) -> None:
    ack = await broker.append("s.a", b"body", {"traceparent": "00-x"}, msg_id="m1")
    assert (ack.stream, ack.seq, ack.duplicate) == ("S", 1, False)
    stored = await broker.leader_last("S", "s.a")
    assert stored is not None
    assert (stored.subject, stored.seq, stored.payload) == ("s.a", 1, b"body")
    assert wire.header(stored.headers, b"traceparent") == b"00-x"
    assert wire.header(stored.headers, b"Nats-Msg-Id") == b"m1"


async def test_the_same_message_id_is_stored_once(broker: Broker) -> None:
    first = await broker.append("s.a", b"1", msg_id="m1")
    again = await broker.append("s.a", b"2", msg_id="m1")
    assert (again.seq, again.duplicate) == (first.seq, True)
    assert await last_seq(broker) == 1


AT_ONCE_SECONDS = APPEND_BUDGET_SECONDS / 2
"""Less than any attempt that is repeated would take."""


async def test_an_expected_sequence_that_is_wrong_is_refused_at_once(broker: Broker) -> None:
    await broker.append("s.a", b"1", after=After("S", 0))
    started = time.monotonic()
    for wrong in (0, 7):
        with pytest.raises(ApiError) as refused:
            await broker.append("s.a", b"2", after=After("S", wrong))
        assert refused.value.err_code == 10071
    assert time.monotonic() - started < AT_ONCE_SECONDS
    assert (await broker.append("s.a", b"2", after=After("S", 1))).seq == 2


async def test_a_full_stream_refuses_at_once(broker: Broker) -> None:
    await make(broker, "FULL", max_bytes=2000)
    started = time.monotonic()
    with pytest.raises(ApiError) as refused:
        await fill(broker, "full.a")
    assert refused.value.err_code == 10077
    with pytest.raises(ApiError):
        await broker.commit([Outgoing("full.a", b"x" * 100), Outgoing("full.b", b"x" * 100)])
    assert time.monotonic() - started < AT_ONCE_SECONDS


async def fill(broker: Broker, subject: str) -> None:
    for _ in range(100):
        await broker.append(subject, b"x" * 100)


async def test_an_append_waits_for_a_stream_that_is_not_there_yet(broker: Broker) -> None:
    waiting = asyncio.create_task(broker.append("later.a", b"x"), name="append")
    await asyncio.sleep(0.3)
    assert not waiting.done()
    await make(broker, "LATER")
    assert (await waiting).seq == 1


async def test_an_append_to_nobody_is_unavailable_when_its_budget_is_spent(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The last attempt of a short budget may have no time left for its answer, and then its outcome is unknown.
    monkeypatch.setattr(jetstream, "Backoff", TwoAttempts)
    started = time.monotonic()
    with pytest.raises(Unavailable, match=r"no\.stream"):
        await broker.append("no.stream.alice", b"x")
    assert 0.1 <= time.monotonic() - started < AT_ONCE_SECONDS


async def test_an_append_goes_on_through_a_restart_of_the_server_and_stores_once(
    broker: Broker, nats_server: NatsServer
) -> None:
    nats_server.kill()
    waiting = asyncio.create_task(broker.append("s.a", b"x", msg_id="m1"), name="append")
    await asyncio.sleep(0.2)
    nats_server.start()
    assert (await waiting).seq == 1
    assert await last_seq(broker) == 1


async def test_an_unanswered_append_is_repeated_only_where_that_cannot_store_twice(
    broker: Broker, nats_server: NatsServer
) -> None:
    async with suspended(nats_server):
        started = time.monotonic()
        with pytest.raises(Unanswered):
            await broker.append("s.a", b"x", budget_seconds=0.3)
        assert time.monotonic() - started < AT_ONCE_SECONDS
        # Both may be repeated; what they did stays unknown until the server answers.
        for options in ({"msg_id": "m1"}, {"after": After("S", 1)}):
            with pytest.raises(Unanswered):
                await broker.append("s.a", b"x", budget_seconds=0.3, **options)  # type: ignore[arg-type]
    # The server reads what was written meanwhile: one without an id, one with, and one that expects another sequence.
    await eventually(lambda: has(broker, "s.a", 2))
    assert (await broker.append("s.a", b"x", msg_id="m1")).duplicate
    assert await last_seq(broker) == 2


async def test_an_append_whose_answer_was_lost_is_known_again_by_what_stands_there(
    broker: Broker, nats_server: NatsServer
) -> None:
    async with bad_network(nats_server.port) as network, connected(f"nats://127.0.0.1:{network.port}") as far:
        for number, stranger in enumerate((False, True)):
            subject = f"s.{number}"
            network.to_client.silence()
            late = asyncio.create_task(far.append(subject, b"x", after=After("S", 0)), name="append")
            seq = await eventually(lambda subject=subject: seq_of(broker, subject))
            if stranger:
                await broker.append(subject, b"x", after=After("S", seq))
            network.restore()
            network.reset()  # the answer is lost, and with it the connection
            if stranger:
                with pytest.raises(ApiError, match="10071"):
                    await late
            else:
                assert (await late).seq == seq
            assert await last_seq(broker) == seq + stranger


async def seq_of(broker: Broker, subject: str) -> int:
    stored = await broker.leader_last("S", subject)
    return 0 if stored is None else stored.seq


async def test_an_append_that_is_refused_after_an_answer_was_lost_says_that_its_outcome_is_unknown(
    broker: Broker, nats_server: NatsServer
) -> None:
    async with bad_network(nats_server.port) as network, connected(f"nats://127.0.0.1:{network.port}") as far:
        network.to_client.silence()
        late = asyncio.create_task(far.append("s.a", b"x" * 100, msg_id="m1"), name="append")
        await eventually(lambda: seq_of(broker, "s.a"))
        config = (await broker.stream("S")).config
        await broker.api("STREAM.UPDATE.S", config | {"max_msg_size": 10})
        network.restore()
        network.reset()
        with pytest.raises(Unanswered):
            await late


async def has(broker: Broker, subject: str, seq: int) -> bool:
    stored = await broker.leader_last("S", subject)
    return stored is not None and stored.seq >= seq


async def test_an_answer_that_is_not_jetstreams_leaves_the_outcome_open(broker: Broker) -> None:
    def reply_nonsense(subject: bytes, reply: bytes, headers: bytes, payload: bytes) -> None:
        broker.publish(reply, payload)

    await broker.subscribe("fake.>", reply_nonsense).confirmed()
    for nonsense in (b"", b"nonsense", b"{}", b"[]", b'{"seq":0}'):
        with pytest.raises(Unanswered, match="not an answer"):
            await broker.append("fake.a", nonsense)


# --- atomic batches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, BATCH_MESSAGES_MAX])
async def test_a_batch_is_stored_whole_and_in_order(broker: Broker, size: int) -> None:
    await broker.append("s.before", b"x")
    messages = [Outgoing(f"s.{i % 7}", b"%d" % i, b"X: %d\r\n" % i) for i in range(size)]
    ack = await broker.commit(messages)
    assert ack.seq == size + 1
    page = await broker.next_by_subject("S", "s.>", 2, batch=1000, max_bytes=8 << 20)
    assert [(one.subject, one.payload, one.seq) for one in page.records] == [
        (f"s.{i % 7}", b"%d" % i, i + 2) for i in range(size)
    ]
    assert all(wire.header(one.headers, b"X") == one.payload for one in page.records)


async def test_a_batch_above_the_limit_or_without_messages_is_refused_here(broker: Broker) -> None:
    for messages in ([], [Outgoing("s.a", b"x")] * (BATCH_MESSAGES_MAX + 1)):
        with pytest.raises(ValueError, match="1 to 1000 messages"):
            await broker.commit(messages)
    assert await last_seq(broker) == 0


async def test_a_batch_with_a_wrong_expectation_is_refused_whole(broker: Broker) -> None:
    await broker.append("s.mark", b"1")
    for size in (0, 1, 10, 999):
        with pytest.raises(ApiError) as refused:
            await broker.commit([*[Outgoing("s.a", b"x")] * size, Outgoing("s.mark", b"2", expect(7))])
        assert refused.value.err_code == 10071
    assert await last_seq(broker) == 1
    assert (await broker.commit([Outgoing("s.a", b"x"), Outgoing("s.mark", b"2", expect(1))])).seq == 3


async def test_of_two_batches_that_follow_the_same_mark_one_is_stored(broker: Broker) -> None:
    await broker.append("s.mark", b"0")
    outcomes = await asyncio.gather(
        *(
            broker.commit([*[Outgoing("s.a", b"%d" % i)] * 50, Outgoing("s.mark", b"%d" % i, expect(1))])
            for i in range(8)
        ),
        return_exceptions=True,
    )
    refused = [outcome for outcome in outcomes if isinstance(outcome, ApiError)]
    assert len(refused) == 7
    assert {error.err_code for error in refused} <= {10071, 10164}
    assert await last_seq(broker) == 52


async def test_a_batch_without_a_stream_or_for_a_stream_that_takes_none_is_not_stored(broker: Broker) -> None:
    for messages in ([Outgoing("no.stream", b"x")], [Outgoing("no.stream", b"x")] * 3):
        with pytest.raises(Unavailable, match="no leader"):
            await broker.commit(messages)
    await make(broker, "PLAIN", allow_atomic=False)
    for messages in ([Outgoing("plain.a", b"x")], [Outgoing("plain.a", b"x")] * 3):
        with pytest.raises(ApiError):
            await broker.commit(messages)
    assert await last_seq(broker, "PLAIN") == 0


async def test_a_batch_the_server_does_not_answer_is_unanswered_and_stored_whole_or_not_at_all(
    broker: Broker, nats_server: NatsServer
) -> None:
    async with suspended(nats_server):
        with pytest.raises(Unanswered, match=r"within 0\.3 s"):
            await broker.commit([Outgoing("s.a", b"x")] * 10, timeout_seconds=0.3)
    await eventually(lambda: has(broker, "s.a", 10))
    assert await last_seq(broker) == 10


async def test_a_batch_in_flight_when_the_connection_is_lost_is_unanswered_at_once(
    broker: Broker, nats_server: NatsServer
) -> None:
    nats_server.suspend()
    committing = asyncio.create_task(broker.commit([Outgoing("s.a", bytes(1000))] * 1000, timeout_seconds=30), name="c")
    await asyncio.sleep(0.1)
    nats_server.kill()
    async with asyncio.timeout(20):
        with pytest.raises(Unanswered, match="lost"):
            await committing
    nats_server.start()
    await eventually(lambda: broker.connected)
    assert await last_seq(broker) in (0, 1000)


# --- reads -------------------------------------------------------------------------------------------------------------------


async def test_pages_hold_a_subject_from_a_sequence_on_and_say_whether_more_follows(broker: Broker) -> None:
    for i in range(10):
        await broker.commit([Outgoing("s.alice", b"%d" % i), Outgoing("s.bob", b"x")])
    seqs: list[int] = []
    next_seq, more = 1, True
    while more:
        page = await broker.next_by_subject("S", "s.alice", next_seq, batch=3)
        seqs += [one.seq for one in page.records]
        assert all(one.subject == "s.alice" for one in page.records)
        next_seq, more = seqs[-1] + 1, page.more
    assert seqs == list(range(1, 21, 2))
    # The sequence asked for is part of the answer.
    page = await broker.next_by_subject("S", "s.alice", 7)
    assert [one.seq for one in page.records][:2] == [7, 9]
    assert not page.more
    assert page.records[0].time.startswith("20")
    # Nothing there is an empty page, not an error.
    assert await broker.next_by_subject("S", "s.alice", 20) == ([], False)
    assert await broker.next_by_subject("S", "s.nobody", 1) == ([], False)
    assert [one.seq for one in (await broker.next_by_subject("S", "s.alice", 0, batch=1)).records] == [1]


async def test_a_page_is_bounded_by_bytes_and_still_makes_progress(broker: Broker) -> None:
    for i in range(10):
        await broker.append("s.alice", bytes(100_000) if i % 2 else b"small")
    seqs: list[int] = []
    pages, more = 0, True
    while more:
        page = await broker.next_by_subject("S", "s.alice", (seqs[-1] if seqs else 0) + 1, max_bytes=50_000)
        assert page.records, "a record larger than the bound must come all the same"
        assert sum(len(one.payload) for one in page.records) < 250_000
        seqs += [one.seq for one in page.records]
        pages, more = pages + 1, page.more
    assert seqs == list(range(1, 11))
    assert pages >= 4


async def test_heads_are_the_last_sequences_of_those_that_have_one(broker: Broker) -> None:
    for i in range(30):
        await broker.append(f"s.user{i % 10}", b"x")
    subjects = [f"s.user{i}" for i in range(BATCH_MESSAGES_MAX)]
    heads = await broker.last_by_subjects("S", subjects)
    assert heads.seqs == {f"s.user{i}": 21 + i for i in range(10)}
    assert heads.up_to == 30
    assert await broker.last_by_subjects("S", ["s.user3"]) == ({"s.user3": 24}, 30)
    for too in ([], [*subjects, "s.one-more"]):
        with pytest.raises(ValueError, match="1 to 1000 subjects"):
            await broker.last_by_subjects("S", too)


async def test_heads_of_none_that_has_one_are_empty(broker: Broker) -> None:
    assert (await broker.last_by_subjects("S", ["s.nobody"])).seqs == {}
    await broker.append("s.alice", b"x")
    assert (await broker.last_by_subjects("S", ["s.nobody"])).seqs == {}


async def test_a_thousand_heads_come_at_once_and_more_by_wildcard_are_refused(broker: Broker) -> None:
    for base in (0, 999):
        await broker.commit([Outgoing(f"s.user{base + i}", b"x") for i in range(1000)])
    heads = await broker.last_by_subjects("S", [f"s.user{i}" for i in range(1000)])
    assert len(heads.seqs) == 1000
    with pytest.raises(ApiError) as refused:
        await broker.last_by_subjects("S", ["s.>"])
    assert refused.value.code == 413


async def test_the_leader_gives_the_next_and_the_last_message_or_none(broker: Broker) -> None:
    assert await broker.leader_last("S", "s.a") is None
    assert await broker.leader_next("S", "s.a", 1) is None
    for i in range(5):
        await broker.commit([Outgoing("s.a", b"%d" % i), Outgoing("s.b", b"")])
    last = await broker.leader_last("S", "s.a")
    assert last is not None
    assert (last.seq, last.payload) == (9, b"4")
    for asked, found in ((0, 1), (1, 1), (2, 3), (9, 9)):
        stored = await broker.leader_next("S", "s.a", asked)
        assert stored is not None
        assert stored.seq == found
    assert await broker.leader_next("S", "s.a", 10) is None
    empty = await broker.leader_next("S", "s.b", 1)
    assert empty is not None
    assert empty.payload == b""


async def test_a_stream_says_its_epoch_and_what_it_holds(broker: Broker) -> None:
    await make(broker, "TAGGED", metadata={"seamark.epoch": "abcd1234", "seamark.partitions": "4"})
    for _ in range(3):
        await broker.append("tagged.a", b"x")
    await broker.api("STREAM.MSG.DELETE.TAGGED", {"seq": 1})
    state = await broker.stream("TAGGED")
    assert (state.epoch, state.partitions, state.first_seq, state.last_seq, state.messages) == ("abcd1234", 4, 2, 3, 2)
    plain = await broker.stream("S")
    assert (plain.epoch, plain.partitions) == (None, None)


async def test_what_does_not_exist_is_an_api_error_and_nobody_to_ask_is_unavailable(broker: Broker) -> None:
    with pytest.raises(ApiError) as refused:
        await broker.stream("NONE")
    assert refused.value.err_code == 10059
    with pytest.raises(ApiError) as refused:
        await broker.leader_last("NONE", "a")
    assert refused.value.err_code == 10059
    for attempt in (broker.next_by_subject("NONE", "a", 1), broker.last_by_subjects("NONE", ["a"])):
        with pytest.raises(Unavailable):
            await attempt


async def test_reads_the_server_does_not_answer_end_at_their_deadline(broker: Broker, nats_server: NatsServer) -> None:
    async with suspended(nats_server):
        started = time.monotonic()
        for attempt in (
            broker.next_by_subject("S", "s.a", 1, timeout_seconds=0.2),
            broker.last_by_subjects("S", ["s.a"], timeout_seconds=0.2),
            broker.leader_last("S", "s.a", timeout_seconds=0.2),
            broker.stream("S", timeout_seconds=0.2),
        ):
            with pytest.raises(Unanswered):
                await attempt
        assert time.monotonic() - started < AT_ONCE_SECONDS
    assert broker._waiting == {}


async def test_a_method_the_server_finds_fault_with_says_so(broker: Broker) -> None:
    with pytest.raises(ApiError) as refused:
        await broker.api("STREAM.MSG.GET.S", {"unknown": 1})
    assert refused.value.err_code == 10025


async def test_what_the_server_says_of_a_message_counts_not_what_its_publisher_wrote(broker: Broker) -> None:
    forged = dict.fromkeys(("Nats-Sequence", "Nats-Subject", "Nats-Time-Stamp", "Nats-Num-Pending"), "7")
    await broker.append("s.forged", b"1", forged)
    lines = b"NATS/1.0 503 away\r\nNats-Sequence: 7\r\n\r\n"
    broker.write(b"HPUB s.status %d %d\r\n%b\r\n" % (len(lines), len(lines), lines))
    await broker.append("s.last", b"3")
    page = await broker.next_by_subject("S", "s.>", 1)
    assert [(stored.subject, stored.seq) for stored in page.records] == [
        ("s.forged", 1),
        ("s.status", 2),
        ("s.last", 3),
    ]
    assert all(stored.time.startswith("20") for stored in page.records)
    heads = await broker.last_by_subjects("S", ["s.forged", "s.status", "s.last"])
    assert heads.seqs == {"s.forged": 1, "s.status": 2, "s.last": 3}
