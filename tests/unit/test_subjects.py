"""Subjects: tokens are reversible and canonical, and nothing a name holds can change a subject's form."""

import contextlib
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seamark.protocol import subjects
from seamark.protocol.errors import InvalidToken
from seamark.protocol.limits import EVENT_TYPE_BYTES_MAX, TOKEN_BYTES_MAX
from seamark.protocol.subjects import decode_token, encode_token, encode_tokens, partition_of, partitions_of

# A character takes at most four bytes, each written in three: ten always fit.
NAMES = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=10)
TYPES = st.from_regex(r"[A-Za-z0-9_-]{1,8}(\.[A-Za-z0-9_-]{1,8}){0,3}", fullmatch=True)


@given(NAMES)
def test_every_name_survives_its_token(name: str) -> None:
    assert decode_token(encode_token(name)) == name


@given(NAMES)
def test_a_token_holds_nothing_that_means_something_in_a_subject(name: str) -> None:
    assert re.fullmatch(r"[A-Za-z0-9_=-]+", encode_token(name))


@given(NAMES, NAMES)
def test_two_names_never_share_a_token(one: str, other: str) -> None:
    assert (encode_token(one) == encode_token(other)) == (one == other)


@given(st.lists(NAMES | st.sampled_from(["", "a\n", "\n", "a\0b", "x=3A", "ann@example.com", "u" * 129]), max_size=8))
def test_many_names_have_the_tokens_that_each_has_alone(names: list[str]) -> None:
    try:
        alone = [encode_token(name) for name in names]
    except InvalidToken as refused:
        with pytest.raises(InvalidToken, match=re.escape(str(refused))):
            encode_tokens(names)
    else:
        assert encode_tokens(names) == alone


@given(
    NAMES,
    st.sampled_from(["", "user-", "é"]),
    st.lists(NAMES | st.integers(0, 20_000).map(str), max_size=12),
    st.sampled_from([1, 3, 4, 12, 16, 64, 256, 300, 512]),
    st.integers(1, 4),
)
def test_many_users_are_in_the_partitions_that_each_is_in_alone(
    tenant: str, beginning: str, users: list[str], partitions: int, lanes: int
) -> None:
    token, tokens = encode_token(tenant), [encode_token((beginning + user)[:20]) for user in users]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(subjects, "_LANES", lanes)  # few users are cut into several lots, too
        found = partitions_of(token, tokens, partitions)
    assert found == [partition_of(token, one, partitions) for one in tokens]


@given(st.text(st.sampled_from("aZ9_-=0123456789ABCDEFabcdef.é* >"), max_size=16) | st.text(max_size=16))
def test_whatever_decodes_is_the_one_token_of_its_name(token: str) -> None:
    try:
        name = decode_token(token)
    except InvalidToken:
        return
    assert encode_token(name) == token


@pytest.mark.parametrize(
    "token",
    [
        "",
        "=",
        "=4",
        "=2e",  # lower-case hex
        "=61",  # `a` stands as it is
        "=FF",  # not UTF-8
        "a=00b",  # a NUL, which no row can hold
        "=C0=80",  # overlong
        "=ED=A0=80",  # a surrogate
        "a.b",
        "a b",
        "a*",
        ">",
        "é",
        "a\n",
        "x" * (TOKEN_BYTES_MAX + 1),
    ],
)
def test_another_spelling_of_a_name_is_refused(token: str) -> None:
    with pytest.raises(InvalidToken):
        decode_token(token)


@pytest.mark.parametrize("name", ["", "\ud800", "x" * 129, "é" * 22, "." * 43])
def test_a_name_that_cannot_be_a_token_is_refused(name: str) -> None:
    with pytest.raises(InvalidToken):
        encode_token(name)


def test_no_user_has_the_name_of_a_topic() -> None:
    assert subjects.encode_user("alice") == "alice"
    for subject_of in (subjects.log_subject, subjects.live_subject, subjects.receipt_subject):
        with pytest.raises(InvalidToken, match="topics"):
            subject_of(0, "default", "topic:news")


def test_what_is_stored_of_a_user_is_found_though_he_could_not_be_called_so_any_more() -> None:
    made = (subjects.log_subject, subjects.live_subject, subjects.receipt_subject)
    letters = subjects.job_letter_subject("acme", "a.b", "*", "*")
    assert subjects.user_subjects(3, "acme", "a.b") == (*(one(3, "acme", "a.b") for one in made), letters)
    assert subjects.user_subjects(3, "acme", "segment:x").log == "log.3.acme.segment=3Ax"


def test_names_of_operators_stay_readable() -> None:
    assert encode_token("alice@example.com") == "alice=40example=2Ecom"
    assert encode_token("Zoë") == "Zo=C3=AB"
    assert encode_token("plain_Name-7") == "plain_Name-7"
    assert encode_token("x" * TOKEN_BYTES_MAX) == "x" * TOKEN_BYTES_MAX


@given(NAMES, NAMES, TYPES, st.integers(0, 99))
def test_a_stored_event_gives_back_what_was_published(tenant: str, key: str, type: str, partition: int) -> None:
    published = subjects.event_subject(tenant, key, type)
    at = subjects.parse_stored_event(f"ev.{partition}.{published.removeprefix('events.')}")
    assert (at.partition, at.tenant, at.key, at.type) == (partition, tenant, key, type)
    assert (at.tenant_token, at.key_token) == (encode_token(tenant), encode_token(key))


@pytest.mark.parametrize(
    "subject",
    [
        "",
        "ev",
        "ev.0.t.k",
        "ev.x.t.k.type",
        "ev.².t.k.type",
        "ev.-1.t.k.type",
        "events.t.k.type.more",
        "ev.0.=61.k.type",
        "ev.0.t..type",
        "ev.0.t.k.",
        "ev.0.t.k.a..b",
        "ev.0.t.k.a b",
        "ev.0.t.k.é",
        "ev.0.t.k." + "x" * (EVENT_TYPE_BYTES_MAX + 1),
    ],
)
def test_any_other_subject_is_refused(subject: str) -> None:
    with pytest.raises(InvalidToken):
        subjects.parse_stored_event(subject)


@given(st.text(max_size=60))
def test_parsing_a_subject_raises_nothing_else(text: str) -> None:
    for subject in (text, f"ev.0.{text}", f"ev.{text}.t.k.a"):
        with contextlib.suppress(InvalidToken):
            subjects.parse_stored_event(subject)


def test_the_hash_is_fnv_1a() -> None:
    # Test vectors of the hash's authors.
    assert subjects.fnv1a(b"") == 0x811C9DC5
    assert subjects.fnv1a(b"a") == 0xE40C292C
    assert subjects.fnv1a(b"foobar") == 0xBF9CF968


@given(NAMES, NAMES, st.integers(1, 64))
def test_a_partition_depends_on_tenant_and_key_only(tenant: str, key: str, partitions: int) -> None:
    p = partition_of(encode_token(tenant), encode_token(key), partitions)
    assert 0 <= p < partitions
    assert p == subjects.fnv1a((encode_token(tenant) + encode_token(key)).encode()) % partitions


def test_subjects_have_the_form_streams_are_made_for() -> None:
    assert subjects.log_subject(3, "acme", "a.b") == "log.3.acme.a=2Eb"
    assert subjects.live_subject(3, "acme", "a.b") == "live.3.acme.a=2Eb"
    assert subjects.receipt_subject(3, "acme", "a.b") == "rcpt.3.acme.a=2Eb"
    assert subjects.mark_subject(3, 1) == "mark.3.1"
    assert subjects.dead_letter_subject(1, "abcd1234", 17) == "dlq.1.abcd1234.17"
    assert subjects.log_stream(3) == "LOG-3"
    assert subjects.dispatch_consumer(3) == "dispatch-3"
