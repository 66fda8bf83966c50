"""A script in Redis whose answer is lost, or a batch of which only a part got through: no projector takes it for another's."""

import asyncio
import json
from collections.abc import AsyncIterator

import pytest
from redis.asyncio import Redis

from engine.errors import StepDown
from engine.partition.reader import Delivered
from ops.dev.servers import Valkey
from projections.projection import UNREAD
from projections.runner import ProjectionWorker
from projections.store import Checkpoint
from projections.unread import store as unread
from projections.unread.store import Applied, UnreadStore
from tests.support.logs import eventually
from tests.support.network import BadNetwork, bad_network


class Far:
    """A projector whose way to Redis is bad, and a look at Redis by a good one."""

    def __init__(self, near: Redis, far: Redis, network: BadNetwork) -> None:
        self.network = network
        self.applied: list[Applied] = []
        self.store = UnreadStore(far, 0, applied=self._on_applied)
        self.worker = ProjectionWorker(None, UNREAD, 0, self.store)  # type: ignore[arg-type] # it asks no broker here
        self.worker._epoch = "e"
        self._near = UnreadStore(near, 0)
        self.cut_after = 0

    def _on_applied(self, applied: Applied) -> None:
        self.applied.append(applied)
        if len(self.applied) == self.cut_after:
            self.network.cut()

    async def stored(self) -> Checkpoint | None:
        return await self._near.checkpoint()


@pytest.fixture
async def far(valkey: Valkey) -> AsyncIterator[Far]:
    async with (
        bad_network(valkey.port) as network,
        Redis.from_url(valkey.url) as near,
        Redis.from_url(f"redis://127.0.0.1:{network.port}/0") as client,
    ):
        one = Far(near, client, network)
        try:
            await one.worker.handle(batch(1))
            yield one
        finally:
            network.restore()
            await one.store.close()


def batch(first: int, count: int = 1) -> list[Delivered]:
    return [
        Delivered(b"log.0.t.u%d" % seq, seq, 0, b"", json.dumps({"id": f"n{seq}", "kind": "notification"}).encode())
        for seq in range(first, first + count)
    ]


async def test_a_stored_batch_whose_answer_was_lost_is_no_reason_to_step_down(far: Far) -> None:
    far.network.to_client.silence()
    handling = asyncio.create_task(far.worker.handle(batch(2)), name="handle")

    async def is_stored() -> bool:
        return await far.stored() == Checkpoint("e", 2)

    await eventually(is_stored)
    far.network.restore()
    far.network.reset()
    await handling
    await far.worker.handle(batch(3))
    assert await far.stored() == Checkpoint("e", 3)
    # Nobody knows the counts of what was not answered, but whose they are is not forgotten.
    assert [(one.seq, one.touched, bool(one.users)) for one in far.applied[1:]] == [
        (2, ["t.u2"], False),
        (3, ["t.u3"], True),
    ]


async def test_a_batch_that_broke_off_halfway_goes_on_from_there(far: Far, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unread, "WEIGHT_MAX", 2)
    far.cut_after = 2  # the first of three scripts
    handling = asyncio.create_task(far.worker.handle(batch(2, 6)), name="handle")
    await eventually(lambda: far.network.refused)
    far.network.restore()
    await handling
    assert await far.stored() == Checkpoint("e", 7)
    assert [one.seq for one in far.applied] == [1, 3, 5, 7]


async def test_a_projector_still_steps_down_for_another_one(far: Far, valkey: Valkey) -> None:
    async with Redis.from_url(valkey.url) as near:
        other = UnreadStore(near, 0)
        assert await other.apply(batch(2, 3), Checkpoint("e", 1), Checkpoint("e", 4))
        with pytest.raises(StepDown):
            await far.worker.handle(batch(2))
        await other.close()
    assert await far.stored() == Checkpoint("e", 4)
