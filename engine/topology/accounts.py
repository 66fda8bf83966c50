"""What no file can know of `nats/accounts.conf` beforehand: users that are made for tenants, and how many logs there are.

Functions of a tenant raise InvalidToken where no tenant can have this name.
"""

from __future__ import annotations

import re
from typing import Final

from engine.errors import TopologyError
from seamark.protocol.subjects import encode_token

PUBLISHERS_MARK: Final = "      # Publishers of further tenants stand above this line"
"""The line of `accounts.conf` before which blocks are put."""

_LOG_LAST: Final = re.compile(r'(?P<indent> *).*"(?P<api>\$JS\.API\.[A-Z.]+\.(?:LOG|\*\.plan)-)(?P<log>\d+)"')
"""The last of the line in a list of logs, or of the consumers that read each of them."""

_LOGS_PER_LINE: Final = 4

_BLOCK: Final = """\
      {{
        user: "{user}", password: ${variable}
        permissions {{
          publish {{
            allow: [
              "events.{token}.>", "bulk.{token}.>", "now.{token}.>", "broadcast.{token}.>"
            ]
          }}
          subscribe: [
            "_INBOX_{user}.>"
            "$JS.EVENT.ADVISORY.STREAM.LEADER_ELECTED.>", "$JS.EVENT.ADVISORY.CONSUMER.LEADER_ELECTED.>"
          ]
        }}
      }}
"""


def publisher_user(tenant: str) -> str:
    """The user that publishes for a tenant, such as `publisher-acme`."""
    return f"publisher-{encode_token(tenant)}"


def publisher_variable(tenant: str) -> str:
    """The environment variable of the server that holds this user's password.

    Different tenants have different variables: each character but letters and digits is written as the hex of its byte.
    """
    name = re.sub(r"[^A-Za-z0-9]", lambda found: f"_{ord(found[0]):02X}", encode_token(tenant))
    return f"SEAMARK_NATS_PUBLISHER_{name}_PASSWORD"


def publisher_block(tenant: str) -> str:
    """A user that may publish this tenant's events, its now messages and broadcasts, and nothing else."""
    user, variable = publisher_user(tenant), publisher_variable(tenant)
    return _BLOCK.format(user=user, variable=variable, token=encode_token(tenant))


def with_publisher(accounts: str, tenant: str) -> str:
    """The text of an `accounts.conf` with this tenant's publisher in it; unchanged if it is there already.

    Raises:
        TopologyError: it is not the file of this project.
    """
    if f'user: "{publisher_user(tenant)}"' in accounts:
        return accounts
    before, mark, after = accounts.partition(PUBLISHERS_MARK)
    if not mark:
        raise TopologyError(
            f"there is no line `{PUBLISHERS_MARK.strip()}` in it",
            "Put it behind the user publisher, or paste the block.",
        )
    return f"{before}{publisher_block(tenant)}\n{mark}{after}"


def with_logs(accounts: str, partitions: int) -> str:
    """The text of an `accounts.conf` whose lists of logs, which name them one by one, go on to the last of `partitions`."""
    lines = accounts.split("\n")
    for index in range(len(lines) - 1, -1, -1):
        found = _LOG_LAST.fullmatch(lines[index])
        if found is None or (index + 1 < len(lines) and f'"{found["api"]}' in lines[index + 1]):
            continue
        missing = [f'"{found["api"]}{p}"' for p in range(int(found["log"]) + 1, partitions)]
        lines[index + 1 : index + 1] = [
            found["indent"] + ", ".join(missing[start : start + _LOGS_PER_LINE])
            for start in range(0, len(missing), _LOGS_PER_LINE)
        ]
    return "\n".join(lines)
