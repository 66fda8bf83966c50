"""Dead letters: which classes there are, and what is done with what cannot be read."""

import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, get_args

import pytest

from engine.broker.jetstream import Stored
from engine.channels.channel import Outcome, OutcomeKind
from engine.errors import InvalidSetting
from engine.jobs.claims import Done, Leased
from engine.jobs.desk import Over
from engine.jobs.life import Doubt, Go, end_of
from engine.jobs.messages import unreadable_job
from engine.jobs.retry import POLICIES, settle
from engine.letters.letter import EVENT_CLASSES, JOB_CLASSES, Letter, deserves_letter, job_letter, letter_of
from engine.letters.replaying import _place
from ops.cli.dlq import SEQ_MAX, _filter
from tests.support.sending import a_job

DOCS = Path(__file__).parents[2] / "docs"


def classes_in(table: str) -> set[str]:
    first = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    return {word for cell in first for word in re.findall(r"`(\w+)`", cell)}


def test_documents_name_every_class_of_letters_and_none_that_there_is_not() -> None:
    of_jobs = (DOCS / "dead_letters.md").read_text().split("| class | |")[1].split("\n\n")[0]
    assert classes_in(of_jobs) == set(JOB_CLASSES)
    of_events = (DOCS / "protocol.md").read_text().split("| reason | |")[1].split("\n\n")[0]
    assert classes_in(of_events) == set(EVENT_CLASSES)


# No send ends as `expired`: what is over is found before a try.
@pytest.mark.parametrize("doubt", [False, True])
@pytest.mark.parametrize("kind", sorted({*get_args(OutcomeKind)} - {"ok", "expired"}))
def test_every_class_that_the_last_try_leads_to_can_be_asked_for(kind: OutcomeKind, doubt: bool) -> None:
    now = datetime.now(UTC)
    job = a_job("sms", "n1", tried_at=now - timedelta(days=30))
    done = settle(job, Leased(1, "w", doubt=doubt), Outcome(kind=kind), POLICIES["sms"], now, 0.5, repeatable=True)
    assert isinstance(done, Done)
    if deserves_letter(done):
        _, _, headers = job_letter(job, done)
        assert headers["Seamark-Class"] in JOB_CLASSES
        assert headers["Seamark-Doubt"] == ("yes" if doubt or kind == "ambiguous" else "no")


@pytest.mark.parametrize("doubt", [None, "lease_lost", "forgotten"])
def test_what_is_over_before_a_try_has_a_class_that_can_be_asked_for(doubt: Doubt | None) -> None:
    over = Over("expired", "ttl", Outcome(kind="expired", code="ttl"))
    done = end_of(a_job("push", "n1"), Go(doubt, doubtful=doubt is not None), over)
    assert deserves_letter(done) == (doubt is not None)
    if deserves_letter(done):
        assert job_letter(a_job("push", "n1"), done)[2]["Seamark-Class"] in JOB_CLASSES


@pytest.mark.parametrize(
    ("subject", "published"),
    [
        ("ev.3.acme.ann=40example=2Ecom.a.b", ("events.acme.ann=40example=2Ecom.a.b", "acme")),
        ("bk.3.acme.a=00b.a.b", ("bulk.acme.a=00b.a.b", "acme")),  # an earlier version took it
        ("ev.3.acme.=61.a", None),
    ],
)
def test_an_event_is_published_again_on_the_subject_it_came_by(subject: str, published: tuple[str, str] | None) -> None:
    assert _place(Letter(seq=1, at=datetime.now(UTC), kind="event", subject=subject)) == published


@pytest.mark.parametrize(
    ("said", "named"),
    [
        ({"cls": "nope"}, "poison"),
        ({"cls": "schema", "kind": "job"}, "permanent"),
        ({"cls": "poison", "kind": "event"}, "schema"),
        ({"channel": "fax"}, "email"),
        ({"kind": "letter"}, "events"),
    ],
)
def test_a_filter_that_no_letter_can_meet_is_refused_with_what_there_is(said: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidSetting, match=named):
        _filter(**said)


def test_a_class_that_there_is_is_looked_for() -> None:
    for cls in (*JOB_CLASSES, *EVENT_CLASSES):
        assert _filter(cls=cls).cls == cls


def test_a_letter_keeps_what_cannot_be_read_and_says_whose_it_is() -> None:
    payload = b'{"id":"n1","type":"a.b","attempt":2,"first_at":17}'
    unreadable = unreadable_job("sms", b"job.sms.normal.acme.ann=40example=2Ecom", payload)
    subject, kept, headers = job_letter(unreadable.job, Done(2, "failed", "poison"), payload)
    assert kept == payload
    block = b"NATS/1.0\r\n" + b"".join(f"{name}: {value}\r\n".encode() for name, value in headers.items())
    said = letter_of(Stored(subject, 3, datetime.now(UTC).isoformat(), block, kept))
    assert said is not None
    assert (said.kind, said.tenant, said.user, said.channel) == ("job", "acme", "ann@example.com", "sms")
    assert (said.cls, said.code, said.id, said.type, said.tries) == ("poison", "unreadable", "n1", "a.b", 3)
    other = job_letter(unreadable.job, Done(2, "failed", "poison"), payload + b" ")
    assert other[0] != subject, "two that cannot be told apart by their ids are two letters"


def test_the_command_knows_the_highest_number_of_a_letter() -> None:
    from engine.letters.reading import SEQ_MAX as READING

    assert SEQ_MAX == READING
