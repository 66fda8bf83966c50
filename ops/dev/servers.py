"""Real servers as child processes: nats-server (alone or three as a cluster), Valkey, PostgreSQL, all from wheels.

Every server keeps its data in a folder of its own and its port for life: kill it, start it again, and it continues with
the same data under the same URL. `start` blocks until the server answers; in a coroutine of a long-lived process call
`prepare` and `wait_ready` through `asyncio.to_thread`, and `spawn` directly (see `Child` for why).
"""

from ops.dev.natsserver import ClusterMember, NatsCluster, NatsServer
from ops.dev.overlay import Change, Overlay
from ops.dev.server import HOST, Server
from ops.dev.stores import Postgres, Valkey

__all__ = [
    "HOST",
    "Change",
    "ClusterMember",
    "NatsCluster",
    "NatsServer",
    "Overlay",
    "Postgres",
    "Server",
    "Valkey",
]
