"""What a provider gives back names a try, and only if we have given it out."""

from datetime import UTC, datetime

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from engine.channels.channel import Job
from engine.channels.email.unsubscribe import Tokens, Unsubscription
from engine.channels.references import PIECES_MAX, TOKEN_CHARS_MAX, References, joined, pieces
from engine.channels.sealed import Sealer, TokenRefused

TRACE = f"00-{'a' * 32}-{'b' * 16}-01"
OLD, NEW = "o" * 40, "n" * 40
NOW = datetime(2026, 1, 1, tzinfo=UTC)


def job(**fields: object) -> Job:
    made: dict[str, object] = {"id": "n1", "tenant": "acme", "user": "alice", "type": "x", "channel": "email",
        "first_at": NOW, "attempt": 2, "category": "news"}  # fmt: skip
    return Job(**{**made, **fields})  # type: ignore[arg-type]


def test_a_reference_names_the_try_under_a_new_secret_and_under_the_old_one() -> None:
    for token in (References([OLD]).of(job()), References([NEW]).of(job())):
        what = References([NEW, OLD]).read(token)
        assert (what.tenant, what.user, what.id, what.channel, what.attempt, what.category) == (
            "acme", "alice", "n1", "email", 2, "news")  # fmt: skip
        assert (what.key, what.claim_key) == (job().key, job().claim_key)


def test_it_says_the_trace_and_which_life_of_the_job_it_was() -> None:
    again = job(tries_before=3, trace=TRACE)
    what = References([NEW]).read(References([NEW]).of(again))
    assert (what.trace, what.attempt, what.claim_key) == (TRACE, 5, again.claim_key)


def test_one_that_was_made_before_it_said_these_is_still_read() -> None:
    class Former(msgspec.Struct, array_like=True):
        tenant: str
        user: str
        id: str
        channel: str
        target: str
        attempt: int
        category: str

    sealer = Sealer([NEW], purpose=b"seamark reference 1", form=Former, chars_max=TOKEN_CHARS_MAX)
    what = References([NEW]).read(sealer.make(Former("acme", "alice", "n1", "email", "", 2, "news")))
    assert (what.category, what.trace, what.claim_key) == ("news", "", what.key)


def test_whoever_has_no_secret_makes_none_and_a_link_is_none() -> None:
    link = Tokens([NEW]).make(Unsubscription(tenant="acme", user="alice", channel="email", category="news"))
    for token in (References([OLD]).of(job()), link, link[:-1], "", "x" * 5000, "é"):
        with pytest.raises(TokenRefused):
            References([NEW]).read(token)
    with pytest.raises(TokenRefused):
        Tokens([NEW]).read(References([NEW]).of(job()))


def test_nothing_of_it_can_be_read_or_changed() -> None:
    token = References([NEW]).of(job(user="alice@example.com"))
    assert "alice" not in token
    for place in range(0, len(token), 7):
        with pytest.raises(TokenRefused):
            References([NEW]).read(token[:place] + ("A" if token[place] != "A" else "B") + token[place + 1 :])


def test_the_longest_names_fit_and_what_does_not_is_the_category() -> None:
    long = job(tenant="t" * 128, user="u" * 128, id="i" * 128, category="ü" * 128, trace=TRACE)
    token = References([NEW]).of(long)
    what = References([NEW]).read(token)
    assert len(token) <= TOKEN_CHARS_MAX
    assert (what.user, what.category, what.trace) == ("u" * 128, "", "")
    shorter = References([NEW]).read(References([NEW]).of(replace(long, category="c" * 128)))
    assert (shorter.category, shorter.trace) == ("c" * 128, ""), "the trace goes first"


@given(st.text("abcXYZ019-_", min_size=1, max_size=TOKEN_CHARS_MAX), st.sampled_from([80, 256]))
def test_pieces_are_few_and_short_and_joined_they_are_the_whole(token: str, chars: int) -> None:
    fields = pieces(token, chars)
    assert len(fields) <= PIECES_MAX
    assert all(len(value) <= chars for value in fields.values())
    assert joined(fields) == token
    assert joined({name: [value] for name, value in fields.items()} | {"ses:operation": ["SendEmail"]}) == token


@given(
    st.dictionaries(
        st.sampled_from(["seamark-0", "seamark-1", "x"]), st.none() | st.integers() | st.lists(st.none() | st.text())
    )
)
def test_no_field_breaks_the_reader(fields: dict[str, object]) -> None:
    joined(fields)
