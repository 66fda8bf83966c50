"""The dispatcher's command with one of its safeguards taken away, named by TEST_LIE: tests must notice."""

import os
from collections.abc import Sequence
from typing import Any

from engine.broker.jetstream import Broker, Outgoing, PubAck
from engine.dispatch import worker
from engine.dispatch.rounds import Round
from engine.dispatch.withholding import Withholding
from engine.dispatch.worker import DispatchWorker
from ops.cli.dispatcher import dispatcher as command


def tell(lie: str) -> None:
    if lie == "no-expectation":
        commit = Broker.commit

        async def unconditional(self: Broker, messages: Sequence[Outgoing], **options: Any) -> PubAck:
            return await commit(self, [Outgoing(message.subject, message.payload) for message in messages], **options)

        Broker.commit = unconditional  # type: ignore[method-assign]
    elif lie == "no-skip":
        worker.not_covered = lambda entries, mark: list(entries)
    elif lie == "home-first":
        settle = DispatchWorker._settle_round

        async def home_first(self: DispatchWorker, round_: Round) -> None:
            await self._append(self._q, [], round_.end, Withholding(None, []))
            await settle(self, round_)

        DispatchWorker._settle_round = home_first  # type: ignore[method-assign]


if __name__ == "__main__":
    tell(os.environ["TEST_LIE"])
    command()
