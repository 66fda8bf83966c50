"""Events as large as they may be: they are dispatched, and a backlog of them does not fill the dispatcher's memory."""

from pathlib import Path

import pytest

from chaos.load import Load
from engine.topology import server as topology
from ops.dev.servers import NatsServer, Valkey
from tests.support.chaos import Chaos
from tests.support.logs import PATIENT, connected
from tests.support.overlays import QUICK_DISK
from tests.support.roles import DispatcherProcess, dispatcher_processes

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(240), pytest.mark.overlay(QUICK_DISK)]


def peak_bytes(process: DispatcherProcess) -> int:
    """The most memory it ever had resident."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


async def test_a_backlog_of_the_largest_events_is_read_within_bounded_memory_and_without_starting_over(
    nats_server: NatsServer, valkey: Valkey, tmp_path: Path, chaos: Chaos
) -> None:
    async with connected(nats_server.url) as broker:
        await topology.ensure(broker, "dev", overrides=PATIENT)
        with dispatcher_processes(tmp_path, nats_server.url, valkey.url, 1) as (only,):
            only.start()
            before = peak_bytes(only)
            only.stop()
            load = Load(broker, chaos.ledger, chaos.rng, chaos.users, fill=250_000)
            for _ in range(600):
                await load.publish("user1", ["user1"])
            only.start()
            await chaos.judge(broker)
            assert peak_bytes(only) - before < 110 << 20, f"{(peak_bytes(only) - before) >> 20} MiB"
            assert only.metric("seamark_partition_gaps_total") == 0
            assert only.metric("seamark_partition_resets_total") == 1
