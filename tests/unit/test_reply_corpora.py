"""What push and SMS providers say: no token or number is given up that still works, and hardly one kept that does not.

The labels are from the providers' documents, and stand beside what they say in `tests/fixtures`. `test_email_replies.py` does the
same for mail servers.
"""

from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import pytest

from engine.channels.channel import Outcome
from engine.channels.exchange import Answer
from engine.channels.push.apns_answers import apns_outcome
from engine.channels.push.fcm_answers import fcm_outcome
from engine.channels.push.webpush_answers import webpush_outcome
from engine.channels.sms import sns, twilio
from engine.channels.sms.callbacks import report_of

KINDS = {
    "invalid": "target_invalid",
    "optedout": "opted_out",
    "refused": "permanent",
    "config": "config",
    "throttled": "throttled",
    "later": "transient",
    "taken": "ok",
}
NOW = datetime(2026, 11, 29, tzinfo=UTC)


class Said(NamedTuple):
    label: str
    who: str
    status: int
    body: str

    @property
    def outcome(self) -> Outcome:
        return READ[self.who](self.status, self.body)


def reported(_: int, body: str) -> Outcome:
    status, _, code = body.partition(" ")
    report = report_of("p", {"MessageSid": "SM1", "MessageStatus": status, "ErrorCode": code}, NOW)
    assert report is not None
    assert report.outcome is not None
    return report.outcome


READ: dict[str, Callable[[int, str], Outcome]] = {
    "apns": lambda status, body: apns_outcome("p", status, body.encode(), "", None),
    "fcm": lambda status, body: fcm_outcome("p", status, body.encode()),
    "webpush": lambda status, body: webpush_outcome("p", status, body.encode()),
    "twilio": lambda status, body: twilio.judged("p", Answer(status, {}, body.encode()), 1),
    "sns": lambda status, body: sns.judged("p", Answer(status, {}, body.encode()), 1),
    "report": reported,
}


def corpus(channel: str) -> list[Said]:
    lines = (Path(__file__).parents[1] / "fixtures" / channel / "replies.txt").read_text().splitlines()
    words = [[*line.split(" ", 3), ""] for line in lines if line and not line.startswith("#")]
    return [Said(label, who, int(status), body) for label, who, status, body, *_ in words]


CHANNELS = pytest.mark.parametrize("channel", ["push", "sms"])


@CHANNELS
def test_nothing_is_given_up_that_may_work(channel: str) -> None:
    gone = {"target_invalid", "opted_out"}
    wrong = [one for one in corpus(channel) if one.label not in ("invalid", "optedout") and one.outcome.kind in gone]
    assert wrong == []


@CHANNELS
def test_hardly_a_hard_failure_is_tried_again(channel: str) -> None:
    hard = [one for one in corpus(channel) if one.label in ("invalid", "optedout")]
    missed = [one for one in hard if one.outcome.kind != KINDS[one.label]]
    assert len(hard) >= 20
    assert len(missed) <= len(hard) // 100, missed


@CHANNELS
def test_each_answer_means_what_it_says(channel: str) -> None:
    said = corpus(channel)
    assert len(said) >= 90
    assert len({one[1:] for one in said}) == len(said), "each stands once"
    assert Counter(one.label for one in said).keys() >= KINDS.keys() - {"optedout"}
    assert [(one, one.outcome.kind) for one in said if one.outcome.kind != KINDS[one.label]] == []


def test_all_corpora_together_are_what_was_asked_for() -> None:
    assert sum(len(corpus(channel)) for channel in ("push", "sms")) >= 200
