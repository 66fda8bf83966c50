"""One stack per data folder: the lock lasts as long as anything that works on the folder."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

from engine.errors import InvalidSetting
from ops.dev.child import Child
from ops.dev.lock import locked

ROOT = Path(__file__).parents[2]

OWNER = """
    import asyncio, sys, time
    from pathlib import Path
    from ops.dev.child import Child
    from ops.dev.lock import locked

    async def own(data):
        async with locked(data, print) as lock:
            child = Child("server", data / "log")
            child.death_signal = 0  # as on a system whose kernel does not tell children
            child.holds = (lock,)
            child.spawn([sys.executable, "-c", "import time; time.sleep(60)"])
            print(child.pid, flush=True)
            time.sleep(60)

    asyncio.run(own(Path(sys.argv[1])))
"""


def killed_owner(data: Path) -> int:
    """A stack is killed; the process id of the server that it leaves."""
    argv = [sys.executable, "-c", textwrap.dedent(OWNER), str(data)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, env=env) as owner:
        assert owner.stdout is not None
        left = int(owner.stdout.readline())
        owner.kill()
    return left


async def test_a_folder_is_locked_while_a_stack_runs_and_free_afterwards(tmp_path: Path) -> None:
    async with locked(tmp_path, print):
        with pytest.raises(InvalidSetting, match=rf"already runs on .* \(pid {os.getpid()}\)"):
            async with locked(tmp_path, print):
                pass
    async with locked(tmp_path, print):
        pass


async def test_a_child_that_outlives_its_stack_keeps_the_folder_locked(tmp_path: Path) -> None:
    left = killed_owner(tmp_path)
    try:
        said: list[str] = []
        with pytest.raises(InvalidSetting, match="lsof"):
            async with locked(tmp_path, said.append, leaving_seconds_max=0.3):
                pass
        assert len(said) == 1
    finally:
        os.kill(left, signal.SIGKILL)


async def test_what_is_left_of_a_killed_stack_is_waited_for(tmp_path: Path) -> None:
    left = killed_owner(tmp_path)
    ending = threading.Timer(0.5, os.kill, (left, signal.SIGKILL))
    ending.start()
    async with locked(tmp_path, print) as lock:
        child = Child("next", tmp_path / "log")
        child.holds = (lock,)
        child.spawn(["true"])
        child.stop(signal.SIGTERM, 10)
    ending.join()
