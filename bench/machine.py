"""What this machine is and what a process has cost: everything is read from the kernel, nothing from the processes themselves."""

import contextlib
import os
import platform
import resource
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

_TICKS = os.sysconf("SC_CLK_TCK")
_FSYNCS = 10


def raise_file_limit(wanted: int = 65_536) -> int:
    """Allow this process and its children as many descriptors as the hard limit gives; the limit now in force."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < wanted:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, wanted))
            return wanted
    target = wanted if hard == resource.RLIM_INFINITY else min(hard, max(soft, wanted))
    resource.setrlimit(resource.RLIMIT_NOFILE, (target, hard))
    return target


def cpu_seconds(pids: Iterable[int]) -> float:
    """User and system time of processes and all their descendants, ended ones that were waited for included."""
    return sum(_cpu_of(pid) for pid in _family(pids))


def rss_bytes(pids: Iterable[int]) -> int:
    """Resident memory of processes and all their descendants."""
    total = 0
    for pid in _family(pids):
        with contextlib.suppress(OSError):
            total += int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return total


def _family(pids: Iterable[int]) -> set[int]:
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                parent = int(entry.joinpath("stat").read_text().rsplit(")", 1)[1].split()[1])
                children.setdefault(parent, []).append(int(entry.name))
    found: set[int] = set()
    waiting = list(pids)
    while waiting:
        pid = waiting.pop()
        if pid not in found:
            found.add(pid)
            waiting.extend(children.get(pid, ()))
    return found


def _cpu_of(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return 0.0
    return sum(map(int, fields[11:15])) / _TICKS


def describe(folder: Path) -> dict[str, Any]:
    """Conditions a figure depends on. `fsync_ms` of the folder the stores are in explains more than the processor's name."""
    return {
        "cores": os.cpu_count(),
        "load_1m": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
        "interpreter_loop_ms": round(loop_ms(), 1),
        "store": {"folder": str(folder), "filesystem": _filesystem(folder), "fsync_ms": round(_fsync_ms(folder), 2)},
    }


def loop_ms() -> float:
    """A million turns of an empty loop: how quick this core is for an interpreter, right now."""
    started = time.perf_counter()
    for _ in range(1_000_000):
        pass
    return (time.perf_counter() - started) * 1e3


def _fsync_ms(folder: Path) -> float:
    path = folder / "fsync-probe"
    descriptor = os.open(path, os.O_CREAT | os.O_WRONLY, 0o600)
    try:
        started = time.perf_counter()
        for _ in range(_FSYNCS):
            os.write(descriptor, b"x" * 4096)
            os.fsync(descriptor)
        return (time.perf_counter() - started) / _FSYNCS * 1e3
    finally:
        os.close(descriptor)
        path.unlink()


def _filesystem(folder: Path) -> str:
    if not sys.platform.startswith("linux"):
        return "unknown"
    best, kind = "", "unknown"
    for line in Path("/proc/mounts").read_text().splitlines():
        _, where, type_, *_ = line.split()
        if str(folder.resolve()).startswith(where) and len(where) >= len(best):
            best, kind = where, type_
    return kind
