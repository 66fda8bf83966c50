"""Pagers as processes, with pages of a size that a test wants: as a module that is run, it is `seamark pager`."""

import os
import sys
from pathlib import Path

import typer

from tests.support.roles import RoleProcess


class PagerProcess(RoleProcess):
    """One pager, for installations with planners.

    Args:
        page_users: recipients of a page, at most.
    """

    def __init__(
        self, name: str, folder: Path, nats_url: str, redis_url: str, postgres_url: str, page_users: int
    ) -> None:
        super().__init__(name, folder, nats_url)
        self._settings = {
            "SEAMARK_REDIS_URL": redis_url,
            "SEAMARK_POSTGRES_URL": postgres_url,
            "TEST_PAGE_USERS": str(page_users),
        }

    def command(self) -> list[str]:
        return ["tests.support.paging"]

    def settings(self) -> dict[str, str]:
        return self._settings


if __name__ == "__main__":
    from engine.campaigns import cuts
    from ops.cli.pager import pager

    cuts.RECIPIENTS_MAX = int(os.environ["TEST_PAGE_USERS"])  # type: ignore[misc]
    sys.argv = sys.argv[:1]
    typer.run(pager)
