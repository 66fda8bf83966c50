"""A refusal suppresses an address only where it says that nobody is there; what is said of us is not said of the recipient."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import NamedTuple, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.channels.channel import Outcome
from engine.channels.email.replies import RETRY_SECONDS_MAX, TEXT_CHARS_MAX, Reply, Stage, classify, parse, table

LABELS = {
    "invalid": ("target_invalid", False),
    "full": ("transient", True),
    "doubt": ("permanent", True),
    "refused": ("permanent", False),
    "config": ("config", False),
    "throttled": ("throttled", False),
    "later": ("transient", False),
}


class Labelled(NamedTuple):
    label: str
    stage: Stage
    reply: Reply

    @property
    def outcome(self) -> Outcome:
        return classify(self.reply, self.stage)


def corpus() -> list[Labelled]:
    lines = (Path(__file__).parents[1] / "fixtures" / "email" / "replies.txt").read_text().splitlines()
    return [labelled(line) for line in lines if line and not line.startswith("#")]


def labelled(line: str) -> Labelled:
    label, stage, reply = line.split(" ", 2)
    return Labelled(label, stage, parse(int(reply[:3]), reply[4:].replace("\\n", "\n")))


def test_nobody_who_may_be_there_is_suppressed() -> None:
    assert [said for said in corpus() if said.label != "invalid" and said.outcome.kind == "target_invalid"] == []


def test_hardly_an_address_without_anybody_is_tried_again() -> None:
    hard = [said for said in corpus() if said.label == "invalid"]
    missed = [said for said in hard if said.outcome.kind != "target_invalid"]
    assert len(hard) > 100
    assert len(missed) <= len(hard) // 100, missed


def test_the_corpus_is_large_and_every_reply_in_it_means_what_it_says() -> None:
    said = corpus()
    assert len(said) >= 200
    assert len({(one.stage, one.reply) for one in said}) == len(said), "each stands once"
    assert Counter(one.label for one in said).keys() == LABELS.keys()
    wrong = [one for one in said if (one.outcome.kind, one.outcome.soft_bounce) != LABELS[one.label]]
    assert wrong == []


@pytest.mark.parametrize("row", table().rows, ids=lambda row: row.example[:60])
def test_each_row_decides_its_example(row) -> None:
    code, _, text = row.example.partition(" ")
    stage = row.stages[0] if row.stages else "rcpt"
    outcome = classify(parse(int(code), text), stage)
    assert outcome.known
    assert (outcome.kind, outcome.scope, outcome.soft_bounce) == (row.kind, row.scope, row.soft_bounce)
    assert outcome.suppress_seconds == row.suppress_seconds
    if row.retry_after_seconds is not None:
        assert outcome.retry_after_seconds == row.retry_after_seconds


TEXTS = st.one_of(st.text(max_size=80), st.sampled_from([said.reply.text for said in corpus()]))


@given(code=st.integers(500, 599), subject=st.sampled_from("3467"), detail=st.integers(0, 999), text=TEXTS,
       stage=st.sampled_from(get_args(Stage)))  # fmt: skip
def test_no_text_makes_a_word_about_policy_or_network_one_about_the_recipient(
    code, subject, detail, text, stage
) -> None:
    reply = parse(code, f"5.{subject}.{detail} {text}")
    if (code, reply.enhanced) != (525, "7.13"):
        assert classify(reply, stage).kind != "target_invalid"


@given(code=st.integers(400, 499), text=TEXTS, stage=st.sampled_from(get_args(Stage)))
def test_nothing_that_may_pass_by_itself_suppresses(code, text, stage) -> None:
    assert classify(parse(code, text), stage).kind not in ("target_invalid", "permanent")


@given(code=st.integers(400, 599), text=TEXTS, stage=st.sampled_from(["connect", "auth", "mail"]))
def test_what_is_said_before_the_recipient_is_named_is_not_about_it(code, text, stage) -> None:
    outcome = classify(parse(code, text), stage)
    assert outcome.kind != "target_invalid"
    assert not outcome.soft_bounce


@pytest.mark.parametrize(("text", "seconds"), [
    ("Greylisted, please try again in 300 seconds", 310),
    ("Greylisted, retry after 5 minutes", 310),
    ("try again in 90s", 100),
    ("Come back in 1 hour", 3610),
    ("try again in 99999 hours", RETRY_SECONDS_MAX),
])  # fmt: skip
def test_a_server_that_names_a_wait_is_given_it_and_a_little_more_but_not_for_ever(text, seconds) -> None:
    assert classify(parse(451, f"4.7.1 {text}"), "rcpt").retry_after_seconds == seconds


def test_a_number_that_is_no_wait_is_none() -> None:
    assert classify(parse(451, "4.3.0 Error 300 in module 7"), "rcpt").retry_after_seconds is None


@pytest.mark.parametrize(("text", "enhanced"), [
    ("5.1.1 User unknown", "1.1"), ("#5.1.1 User unknown", "1.1"), ("User unknown 5.1.1", ""), ("5.0.0 No", ""), ("5.1", ""),
    ("5.1.1000 No", ""), ("", ""), ("6.1.1 No", ""), ("5.07.1 No", "7.1"),
])  # fmt: skip
def test_an_enhanced_code_stands_at_the_beginning(text, enhanced) -> None:
    assert parse(550, text).enhanced == enhanced


def test_what_nobody_has_foreseen_follows_its_first_digit_and_is_shown_to_operators() -> None:
    assert classify(parse(599, "Wat"), "end") == Outcome(kind="permanent", code="599", known=False)
    assert classify(parse(499, "Wat"), "end") == Outcome(kind="transient", code="499", known=False)


def test_an_endless_reply_is_cut_before_it_is_judged() -> None:
    assert len(parse(550, "x" * 1_000_000).text) == TEXT_CHARS_MAX


def test_an_outcome_holds_nothing_of_the_text() -> None:
    """Servers repeat the address, and an outcome is stored."""
    assert "secret" not in repr(classify(parse(550, "5.1.1 <secret@example.com>: User unknown"), "rcpt"))
