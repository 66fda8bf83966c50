"""The one runner of all that consume an ordered partition: dispatcher, job makers, projections, pager.

The broker's consumer is only a reading head. The position lives with the effect, and whoever stores it refuses an old
reader by compare-and-set; pinning (one active reader, hot standbys) saves work, it does not exclude. Without acks nothing
is redelivered by itself, so every doubt ends in `CONSUMER.RESET` to the position and a dense read from there.
Why no acks: after a take-over the broker first hands out what lies beyond the old reader's unacknowledged messages.
"""

from __future__ import annotations

import asyncio
import math
import time

import structlog
from nats.nuid import NUID

from engine import metrics
from engine.broker import wire
from engine.broker.jetstream import Broker
from engine.broker.refusals import is_missing
from engine.errors import BrokerError, PartitionStopped, StepDown, Unanswered
from engine.limits import (
    BUFFERED_PULLS_MAX,
    KEEP_POSITION_SECONDS,
    PIN_TIMEOUT_SECONDS,
    PULL_BATCH,
    QUIET_CHECK_SECONDS,
)
from engine.log.incarnations import missing
from engine.partition.head import ReadingHead
from engine.partition.pulls import Pace, Pulls
from engine.partition.worker import Delivered, Phase, Source, Worker
from engine.tasks import end, end_if_cancelled
from seamark.backoff import Backoff

__all__ = ["Delivered", "PartitionReader", "Phase", "Source", "Worker"]

_log = structlog.get_logger("seamark.partition")

PULL_GRACE_SECONDS = 1.0
RETRY_SECONDS_MIN = 0.25
RETRY_SECONDS_MAX = 2.0  # trying again may begin with a take-over, which is stored: hours of it must not fill the log
STOPPED_RETRY_SECONDS = 10.0
CLOCKS_SECONDS = 60.0  # how far the broker's clock may be from ours
# Asked for with each message: looked up in its class it costs Python 3.11 a tenth of a microsecond.
_READING = Phase.READING


class PartitionReader:
    """Feeds one partition to its worker in order, from the worker's position, while this process holds the pin.

    Args:
        source: what is read.
        worker: what is done with it.
        pin_timeout_seconds: the consumer's `priority_timeout`: silence of the reader after which a standby gets the pin.
    """

    def __init__(
        self, broker: Broker, source: Source, worker: Worker, *, pin_timeout_seconds: float = PIN_TIMEOUT_SECONDS
    ) -> None:
        self._broker = broker
        self._source = source
        self._worker = worker
        # A pull with our pin keeps it: pulls must end, and so be renewed, well within the time-out.
        self._expires_seconds = pin_timeout_seconds / 2
        self._quiet_seconds = min(QUIET_CHECK_SECONDS, pin_timeout_seconds)
        self._inbox = f"{broker.settings.inbox_prefix}.{NUID().next().decode()}"
        self._head = ReadingHead(broker, source)
        # Without the wildcard, which is `>` or `*`: consumers of a log bring the marks in it, too (ADR 0053).
        self._prefix = source.subject[:-1].encode()
        self._pulls = Pulls(broker, source.stream, source.consumer, self._inbox, self._expires_seconds)
        self._pin: bytes | None = None
        self._buffer: list[Delivered] = []
        self._buffer_bytes, self._verified, self._doubt = 0, False, False
        self._start_seq, self._last_seq, self._next_consumer_seq = 1, 0, 1
        self._retries = Backoff(RETRY_SECONDS_MIN, RETRY_SECONDS_MAX, jitter=0.5)
        self._clear_at, self._keep_at, self._keep_seq = 0.0, math.inf, 0
        self._pace = Pace()
        self._heard_at = self._message_at = time.monotonic()
        self._wake = asyncio.Event()
        self._log = _log.bind(stream=source.stream, consumer=source.consumer)
        self._metrics = metrics.partition(source.stream, source.consumer)
        self._remedy = ""
        self.phase = Phase.STANDBY

    # --- deciding and doing ------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Read for ever; ends by cancellation, and then gives the pin back so that a standby need not wait for it."""
        broker, source = self._broker, self._source
        unpinned = f"$JS.EVENT.ADVISORY.CONSUMER.UNPINNED.{source.stream}.{source.consumer}"
        subscriptions = [
            broker.subscribe(f"{self._inbox}.*", self._on_message),
            broker.subscribe(unpinned, self._on_unpinned),
        ]
        broker.on_reconnect.append(self._on_reconnect)
        broker.on_leader_change.append(self._on_leader_change)
        watch = asyncio.create_task(self._watch(), name=f"watch {source.consumer}")
        try:
            self._pull()
            while True:
                end_if_cancelled()
                await self._turn()
        finally:
            await end(watch)
            broker.on_reconnect.remove(self._on_reconnect)
            broker.on_leader_change.remove(self._on_leader_change)
            for subscription in subscriptions:
                subscription.unsubscribe()
            if self._pin is not None and broker.connected:
                await self._head.give_back(self._pin)

    async def _turn(self) -> None:
        """One decision: the most urgent thing is done."""
        try:
            if self.phase is Phase.STOPPED:
                await self._wait_for_repair()
            elif self.phase is Phase.TAKING_OVER:
                await self._take_over()
            elif self.phase is Phase.READING and self._doubt and not (self._buffer and self._verified):
                await self._reset(self._last_seq + 1 if self._verified else self._start_seq)
            elif self.phase is Phase.READING and self._buffer:
                await (self._handle() if self._verified else self._verify_first())
            elif self.phase is Phase.READING and self._clear_at and time.monotonic() >= self._keep_at:
                await self._keep_position()
            else:
                self._wake.clear()
                await self._wake.wait()
        except StepDown as error:
            self._log.info("partition_given_up", why=str(error))
            self._metrics.step_downs.inc()
            self._to_standby()
        except PartitionStopped as error:
            self._stop(error)
        except (BrokerError, OSError, TimeoutError) as error:
            if is_missing(error):
                return self._stop(missing(self._source.stream))
            self._log.warning("partition_interrupted", error=type(error).__name__, detail=str(error)[:200])
            await asyncio.sleep(self._retries.next_seconds())

    async def _take_over(self) -> None:
        self._metrics.take_overs.inc()
        pin = self._pin
        next_seq = await self._worker.acquire()
        if self.phase is Phase.TAKING_OVER and self._pin == pin:
            self._metrics.owned.set(1)
            self._clear_at, self._keep_at, self._keep_seq = 0.0, time.monotonic() + KEEP_POSITION_SECONDS, 0
            self._log.info("partition_taken_over", next_seq=next_seq)
            await self._reset(next_seq)

    async def _reset(self, next_seq: int) -> None:
        """Put the reading head to `next_seq`; what comes before consumer sequence 1 belongs to the time before."""
        self.phase = Phase.READING
        self._empty_buffer()
        self._start_seq, self._last_seq, self._next_consumer_seq = next_seq, next_seq - 1, 1
        self._metrics.resets.inc()
        # Raised first: if this fails half-way, the next turn comes back here.
        self._doubt = True
        source, pin = self._source, self._pin
        state = await self._broker.stream(source.stream)
        if not self._still_reads(pin):
            return  # a RESET now would disturb the reader that was chosen meanwhile
        self._worker.check(state)
        if next_seq > state.last_seq + 1:
            # A new leader that has not caught up, or a stream put back to a backup: the stored position knows.
            if self.phase is Phase.READING:
                self.phase = Phase.TAKING_OVER
            raise Unanswered(f"{source.stream} ends at {state.last_seq}, and {next_seq} was to come next")
        # Not where nothing of this partition waited when what is left was stored already: others' messages were trimmed.
        moved = state.first_seq > next_seq and not source.sparse
        if moved and state.oldest_at > self._clear_at - CLOCKS_SECONDS:
            self._metrics.possibly_trimmed.inc()
            self._log.error("messages_may_be_trimmed_unread", next_seq=next_seq, first_seq=state.first_seq)
        # Before the answer comes, a message with consumer sequence 1 may be there already.
        self._doubt = False
        try:
            await self._head.put(next_seq)
        except BaseException:
            self._doubt = True
            raise
        self._message_at = time.monotonic()
        self._pull()

    def _still_reads(self, pin: bytes | None) -> bool:
        return self.phase is Phase.READING and self._pin == pin

    async def _verify_first(self) -> None:
        """The first message after a RESET must be the one the leader names: an old message may wear sequence 1, too."""
        first, start = self._buffer[0].seq, self._start_seq
        found = await self._broker.leader_next(self._source.stream, self._source.subject, start)
        if self.phase is not Phase.READING or not self._buffer or self._buffer[0].seq != first:
            return
        if found is not None and found.seq == first:
            self._verified = True
        else:
            # With a pause: a leader that shows less than its consumer has sent would be asked without end.
            self._doubt = True
            raise Unanswered(f"the reading head is at {first}, the leader's next is {found and found.seq}")

    async def _handle(self) -> None:
        if (pause := self._pace.pause_seconds(len(self._buffer))) > 0:
            await asyncio.sleep(pause)
            return  # what has changed meanwhile is seen by the next turn
        batch, self._buffer, self._buffer_bytes = self._buffer, [], 0
        self._pull()  # what comes next is on its way meanwhile
        try:
            await self._worker.handle(batch)
        except (BrokerError, OSError, TimeoutError):
            # What of the batch is applied only the stored position knows.
            if self.phase is Phase.READING:
                self.phase = Phase.TAKING_OVER
            raise
        self._retries.succeeded()
        self._metrics.handled.inc(len(batch))
        self._pull()

    async def _keep_position(self) -> None:
        """Nothing has come for a while: move the position past messages of other partitions, before age trims them."""
        self._keep_at = time.monotonic() + KEEP_POSITION_SECONDS
        last, pin = self._last_seq, self._pin
        state = await self._broker.stream(self._source.stream)
        self._worker.check(state)
        # The end of the stream as it was last time: a new leader may not show everything yet, but none lags for so long.
        reached, self._keep_seq = max(last, self._keep_seq), state.last_seq
        found = await self._broker.leader_next(self._source.stream, self._source.subject, last + 1)
        # A message that came meanwhile moves the position by itself.
        if found is None and self._last_seq == last and self._still_reads(pin):
            await self._worker.pass_over(reached)
            if self._last_seq == last and self._still_reads(pin):
                self._start_seq, self._last_seq = reached + 1, reached

    def _to_standby(self) -> None:
        self.phase, self._pin, self._doubt = Phase.STANDBY, None, False
        self._empty_buffer()
        self._message_at = time.monotonic()
        self._metrics.owned.set(0)
        self._metrics.stopped.set(0)
        self._pull()

    def _stop(self, error: PartitionStopped) -> None:
        # A remedy that was followed may show the next one; the details hold numbers that move.
        if self.phase is not Phase.STOPPED or error.remedy != self._remedy:
            self._log.error("partition_stopped", why=error.detail, remedy=error.remedy)
        self._remedy = error.remedy
        self.phase, self._pin = Phase.STOPPED, None
        self._empty_buffer()
        self._metrics.stopped.set(1)
        self._metrics.owned.set(0)
        self._wake.set()

    async def _wait_for_repair(self) -> None:
        await asyncio.sleep(STOPPED_RETRY_SECONDS)
        await self._worker.position()
        self._log.info("partition_repaired")
        self._pulls.give_up()
        self._to_standby()

    # --- what the broker sends ---------------------------------------------------------------------------------------

    def _on_message(self, subject: bytes, reply: bytes, headers: bytes, payload: bytes) -> None:
        self._heard_at = time.monotonic()
        if not reply:
            self._on_status(headers)
            return
        wanted = self._pulls.arrived()
        if self._pin is None or headers.rfind(self._pin) < 0:  # it stands last
            self._on_new_pin(headers)
            return
        if self.phase is not _READING or self._doubt:
            return
        # $JS.ACK.<stream>.<consumer>.<delivered>.<stream seq>.<consumer seq>.<stored at>.<pending>
        _, word, consumer_seq, stored_at, _ = reply.rsplit(b".", 4)
        seq = int(word)
        buffer = self._buffer
        # Pulls that were given up may deliver, too: beyond two batches they are read again later.
        full = len(buffer) >= PULL_BATCH * BUFFERED_PULLS_MAX
        if int(consumer_seq) != self._next_consumer_seq or seq <= self._last_seq or full:
            if self._next_consumer_seq > 1:
                self._metrics.gaps.inc()
                self.suspect()
            return
        self._next_consumer_seq += 1
        if subject.startswith(self._prefix):
            # What is passed over proves nothing: after somebody else's RESET, it may lie behind a message that never came.
            self._last_seq = seq
            # Only what is accepted ends the silence: after somebody else's RESET, messages that are ignored may come for ever.
            self._message_at = self._heard_at
            if not buffer:
                self._wake.set()
            buffer.append(Delivered(subject, seq, int(stored_at), headers, payload))
            self._buffer_bytes += len(payload)
        if wanted:
            self._pulls.order(self._pin, len(buffer), self._buffer_bytes)

    def _on_new_pin(self, headers: bytes) -> None:
        """The broker chose this reader anew: whatever it read under an older pin is void."""
        pin = wire.added_at_the_end(headers, b"Nats-Pin-Id")
        if pin is None or self.phase is Phase.STOPPED:
            return
        self._pin, self.phase, self._doubt = pin, Phase.TAKING_OVER, False
        self._empty_buffer()
        self._wake.set()

    def _on_status(self, headers: bytes) -> None:
        """A pull ended: by itself, because another reader has the pin (423), or because the consumer moved."""
        expected = self._pulls.ended(headers)
        if wire.status(headers) == 423:
            if self.phase is not Phase.STOPPED:
                self._to_standby()
        elif expected:
            self._pull()
        else:
            # No consumer or no leader just now. The watch pulls again; asking at once would be a hot loop.
            self._log.debug("pull_refused", status=wire.status(headers), why=wire.description(headers))
            self.suspect()

    def _pull(self) -> None:
        if self.phase not in (Phase.TAKING_OVER, Phase.STOPPED):
            self._pulls.order(self._pin, len(self._buffer), self._buffer_bytes)

    def _empty_buffer(self) -> None:
        self._buffer, self._buffer_bytes, self._verified = [], 0, False

    def suspect(self) -> None:
        """Something may have been missed, or changed: look at the stream again and read on from the position."""
        if self.phase is Phase.READING:
            self._doubt = True
            self._wake.set()

    def take_over_again(self) -> None:
        """The stored position may not be what the worker left: take the partition over again, from what is stored now."""
        if self.phase is Phase.READING:
            self.phase = Phase.TAKING_OVER
            self._wake.set()

    def _on_reconnect(self) -> None:
        self._pulls.give_up()
        self.suspect()
        self._pull()

    def _on_leader_change(self, stream: str, consumer: str) -> None:
        if stream == self._source.stream and consumer in ("", self._source.consumer):
            self._on_reconnect()

    def _on_unpinned(self, subject: bytes, reply: bytes, headers: bytes, payload: bytes) -> None:
        self._message_at = 0.0

    # --- silence -----------------------------------------------------------------------------------------------------

    async def _watch(self) -> None:
        """Silence may mean that there is nothing, or that the reading head is past what nobody has applied."""
        while True:
            end_if_cancelled()  # the worker's position may be in Redis
            await asyncio.sleep(self._quiet_seconds / 4)
            now = time.monotonic()
            silence = now - max(self._heard_at, self._pulls.ordered_at)
            if self._pulls.outstanding and silence > self._expires_seconds + PULL_GRACE_SECONDS:
                self._log.warning("pull_unanswered")
                self._pulls.give_up()
                self.suspect()
            try:
                self._pull()
                if now - self._message_at >= self._quiet_seconds:
                    await self._ask_leader()
                    self._message_at = max(self._message_at, now)
            except PartitionStopped as error:
                self._stop(error)
            except (BrokerError, OSError, TimeoutError) as error:
                if is_missing(error):
                    self._stop(missing(self._source.stream))
                self._log.debug("leader_not_asked", error=type(error).__name__)
            except Exception:
                # Without the watch a lost message is never missed; what we did not foresee must not end it.
                self._log.exception("partition_watch_failed")

    async def _ask_leader(self) -> None:
        """Is there a message that should have come? Then the reading head is wrong."""
        if self.phase is Phase.READING and not self._buffer and not self._doubt:
            last, asked_at = self._last_seq, time.time()
            found = await self._broker.leader_next(self._source.stream, self._source.subject, last + 1)
            if found is None:
                self._clear_at = asked_at
                self._wake.set()
            elif self._last_seq == last:
                self.suspect()
        elif self.phase is Phase.STANDBY and await self._is_neglected():
            next_seq = await self._worker.position()
            if await self._broker.leader_next(self._source.stream, self._source.subject, next_seq) is None:
                return
            # Asked again: a reader that was chosen meanwhile has put the reading head where it belongs.
            if await self._is_neglected():
                self._log.info("reading_head_put_back", next_seq=next_seq)
                await self._head.put(next_seq)

    async def _is_neglected(self) -> bool:
        """Whether no reader is chosen, and this one was not chosen while that was asked."""
        return not await self._head.is_pinned() and self.phase is Phase.STANDBY
