"""Reserves the ports that a stack has chosen until somebody listens on them.

Seconds pass between the choice of a port and the first process that listens there. Without a reservation, stacks that start
at the same moment would all choose the usual port, and each would take the gateway that answers there for its own.
"""

from __future__ import annotations

import socket
import sys

from ops.dev.child import free_port, is_free
from ops.dev.server import HOST


class Reservations:
    """The ports of one stack. Other stacks in this network namespace cannot take them before `close` or our end.

    Only Linux has the abstract socket names this needs. Elsewhere nothing is reserved: a port is taken if it is free.
    """

    def __init__(self) -> None:
        self._held: dict[int, socket.socket] = {}

    def take(self, port: int) -> bool:
        """Whether this port is ours now and nobody listens there."""
        if not is_free(port, HOST):
            return False
        if port in self._held:
            return True
        name = socket.socket(socket.AF_UNIX)
        try:
            if sys.platform.startswith("linux"):
                name.bind(f"\0seamark-dev-port-{port}")  # lives in the network namespace, as ports do, and dies with us
        except OSError:
            name.close()
            return False
        self._held[port] = name
        return True

    def take_any(self) -> int:
        """A free port that is ours now."""
        while not self.take(port := free_port(HOST)):
            pass
        return port

    def close(self) -> None:
        """Release all ports."""
        for name in self._held.values():
            name.close()
        self._held.clear()
