"""What the documentation shows in blocks, and what each block is: commands, programs, or something that cannot run."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.support.forks import ROOT

PROGRAMS: Final = ("seamark", "nats", "make", "export")
"""What a line of commands may begin with. A test that runs a block knows what to do with each of them."""

NOT_RUN: Final = {
    ("README.md", "flowchart LR"): "a picture",
    ("README.md", "pip install seamark"): "tests/acceptance/test_distributions.py installs its wheel",
    ("docs/clients.md", "pip install seamark"): "as in README.md",
    (
        "docs/architecture.md",
        "service ──publish──▶ events.<tenant>.<key>.<type>       stream EVENTS, stored as ev.<q>.<tenant>.<key>.<type>",
    ): ("a picture"),
    (
        "docs/operations.md",
        "ok      room: EVENTS is 4 % full, 31.2 messages/s lately, room for 314/s over its age: age frees room before it is full",
    ): "what `topology check` says after hours of traffic; tests/unit/test_topology_room.py has the sentences",
    ("docs/worker.md", "[push.apple]"): "tests/unit/test_providers_file.py reads it",
    ("docs/push.md", "[push.apple]"): "tests/unit/test_push_settings.py makes senders of it",
    ("docs/webhooks.md", "[webhook]"): "tests/unit/test_webhook_settings.py makes a channel of it",
    ("docs/email.md", "[email.providers.own]"): "tests/unit/test_email_settings.py makes a channel of it",
    ("docs/email.md", "[callbacks.ses]"): "tests/unit/test_callback_settings.py reads it",
    ("docs/sms.md", "[sms]"): "tests/unit/test_sms_settings.py makes channels of it",
    ("docs/sms.md", "[callbacks.twilio]"): "as in docs/email.md",
    (
        "docs/deployment.md",
        "docker build -t registry.example.com/seamark:0.1.0 .",
    ): "tests/acceptance/test_image.py runs what the file runs",
    (
        "docs/deployment.md",
        "kubectl create namespace seamark",
    ): "tests/acceptance/test_chart.py has the keys that pods ask for",
    (
        "docs/deployment.md",
        "helm dependency build deploy/helm/seamark",
    ): "tests/acceptance/test_chart.py renders that set",
    (
        "docs/deployment.md",
        'held=(); for role in dispatcher gateway worker planner pager; do held+=(--set "roles.$role.tag=0.1.0"); done',
    ): "tests/acceptance/test_chart.py looks at the roles and sets such a tag",
    (
        "docs/deployment.md",
        "for number in 0 1 2; do",
    ): "tests/acceptance/test_chart.py has the names of claims and values",
    ("docs/deployment.md", "extraEnv:"): "tests/acceptance/test_chart.py renders it",
    (
        "docs/deployment.md",
        "for user in publisher dispatcher gateway projector planner pager worker operator provisioner backup system cluster; do",
    ): "tests/acceptance/test_image.py runs it, all but its last line",
    ("docs/operations.md", '{ user: admin, password: "something long" }'): (
        "a line for accounts.conf on an operator's cluster; every cluster of the tests runs with that very line"
    ),
}
"""Blocks that nothing can run, by document and first line: why not, and who checks them instead."""

_FENCE: Final = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```\s*$", re.MULTILINE | re.DOTALL)
_SPAN: Final = re.compile(r"(?<!`)`(seamark [a-z][^`\n]*)`(?!`)")


@dataclass(frozen=True, slots=True)
class Block:
    """One fenced block of a document; `line` is its fence's."""

    document: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.document}:{self.line}"

    @property
    def kind(self) -> str:
        """`commands`, `python`, `js`, `json`, `toml`, `not run`, or `unknown`."""
        if (self.document, self._first_line) in NOT_RUN:
            return "not run"
        if self.language in ("python", "js", "json", "toml"):
            return self.language
        lines = self.commands
        return "commands" if lines and all(words[0] in PROGRAMS for words in lines) else "unknown"

    @property
    def _first_line(self) -> str:
        return self.text.strip().partition("\n")[0].strip()

    @property
    def commands(self) -> list[list[str]]:
        """The commands in words, without comments: those behind a `$` where it has any, else all lines."""
        lines = self.text.replace("\\\n", " ").splitlines()
        if any(line.startswith("$ ") for line in lines):
            lines = [line[2:] for line in lines if line.startswith("$ ")]
        elif self.language not in ("sh", "") or not self._first_line.startswith((*PROGRAMS, ".venv/bin/")):
            return []
        found = [shlex.split(line, comments=True) for line in lines]
        return [[words[0].removeprefix(".venv/bin/"), *words[1:]] for words in found if words]


def documents() -> list[Path]:
    """What users and contributors read."""
    return [
        ROOT / "README.md",
        ROOT / "seamark/README.md",
        ROOT / "CONTRIBUTING.md",
        *sorted((ROOT / "docs").rglob("*.md")),
    ]


def blocks() -> list[Block]:
    """Every fenced block of every document, in order."""
    found: list[Block] = []
    for path in documents():
        text = path.read_text(encoding="utf-8")
        name = path.relative_to(ROOT).as_posix()
        found += [
            Block(name, text.count("\n", 0, match.start()) + 1, match[1], match[2]) for match in _FENCE.finditer(text)
        ]
    return found


def named_commands() -> Iterator[tuple[str, list[str]]]:
    """Every `seamark …` inside a sentence or a table: where, and its words."""
    for path in documents():
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            for match in _SPAN.finditer(line):
                yield f"{path.relative_to(ROOT).as_posix()}:{number}", match[1].replace("\\|", "|").split()
