"""What the health port of several processes says of those that are dead."""

import json

from ops.commonport import DEAD_SECONDS, _Common


async def test_processes_that_are_dead_for_long_are_not_hidden_behind_one_that_lives() -> None:
    async def ask(_: str) -> dict[int, str | None]:
        return dict(enumerate(said))

    async def status() -> tuple[int, list[str]]:
        answer = await common.healthz(None)  # type: ignore[arg-type]
        assert isinstance(answer.body, bytes)
        return answer.status, json.loads(answer.body)["reasons"]

    clock, said = 0.0, [None, "alive"]
    common = _Common("127.0.0.1", [1, 2], now=lambda: clock)
    common._ask = ask  # type: ignore[method-assign]
    try:
        assert await status() == (200, ["process 0 is not alive"]), "it is being replaced"
        clock = DEAD_SECONDS - 1
        said = ["alive", None]
        assert await status() == (200, ["process 1 is not alive"]), "another one"
        clock = 2 * DEAD_SECONDS - 1
        assert await status() == (503, ["process 1 is not alive"])
        assert (await common.readyz(None)).status == 200  # type: ignore[arg-type]
        said = ["alive", "alive"]
        assert await status() == (200, [])
        said = [None, None]
        assert (await status())[0] == 503
    finally:
        await common.http.close()
