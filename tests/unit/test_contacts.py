"""Addresses, numbers, languages and zones: what is taken, in which one form, and that a refusal repeats nothing."""

import string
from hashlib import sha256

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from engine.channels.email.message import BadAddress, ascii_address
from engine.directory.contacts import address_hash, checked_email, checked_locale, checked_phone, checked_timezone
from engine.directory.push_tokens import TokenId
from engine.directory.suppressions import NewSuppression, Reason
from engine.directory.templates import Locale
from engine.directory.topics import TopicName
from engine.directory.users import (
    UserFields,
    UserPatch,
    checked_stored_id,
    checked_user_id,
    encoded_attributes,
    merged,
)


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("alice@example.com", "alice@example.com"),
        (" Alice+news@EXAMPLE.Com ", "Alice+news@example.com"),
        ("o'hara@sub.example.co.uk", "o'hara@sub.example.co.uk"),
        ("jürgen@bücher.example", "jürgen@bücher.example"),
        ("a@xn--bcher-kva.example", "a@xn--bcher-kva.example"),
    ],
)
def test_an_address_is_kept_in_one_form(given: str, kept: str) -> None:
    assert checked_email(given) == kept
    assert checked_email(kept) == kept


@pytest.mark.parametrize(
    "wrong",
    ["", "alice", "alice@", "@example.com", "a b@example.com", "a@b@example.com", "alice@example", "a@-x.com", "a@x-.com",
     "a@x..com", "a@.com", "a\n@example.com", "a,b@example.com", "<a@example.com>", "a" * 65 + "@example.com",
     "a@" + "b" * 64 + ".com", "a@" + ".".join(["b" * 60] * 5), "a@example.com\r\nBcc: x@example.com", "a\x00@example.com"],
)  # fmt: skip
def test_what_is_no_address_is_refused_without_being_repeated(wrong: str) -> None:
    with pytest.raises(ValueError, match="`email` is no e-mail address") as refused:
        checked_email(wrong)
    assert len(wrong) < 14 or wrong not in str(refused.value)


@pytest.mark.parametrize(
    "wrong",
    [
        "",
        "43664",
        "+0664123456",
        "+43 664 1234567",
        "0043664123456",
        "+4366412345678901",
        "+\u0664\u0663\u0666\u0666\u0664\u0661\u0662",
    ],
)
def test_a_number_is_one_of_e164_or_refused(wrong: str) -> None:
    with pytest.raises(ValueError, match="`phone` is no number"):
        checked_phone(wrong)


def test_numbers_of_all_lengths_that_exist_are_taken() -> None:
    for digits in ("1234567", "4366412345678", "123456789012345"):
        assert checked_phone(f"+{digits}") == f"+{digits}"


@pytest.mark.parametrize(
    ("given", "kept"),
    [("DE", "de"), ("de-at", "de-AT"), ("zh-hant-tw", "zh-Hant-TW"), ("es-419", "es-419"), ("sl-rozaj-biske", "sl-rozaj-biske"),
     ("de-CH-1996", "de-CH-1996"), ("en-us-u-islamcal", "en-US-u-islamcal"), ("de-x-private", "de-x-private")],
)  # fmt: skip
def test_a_locale_is_kept_in_its_usual_letters(given: str, kept: str) -> None:
    assert checked_locale(given) == kept


@pytest.mark.parametrize(
    "wrong", ["", "d", "de_AT", "de-", "-de", "de-AT-", "de-A", "en" + "-abcde" * 8, "de AT", "d\u00e9"]
)
def test_what_is_no_locale_is_refused(wrong: str) -> None:
    with pytest.raises(ValueError, match="`locale` is no language tag"):
        checked_locale(wrong)


def test_zones_of_the_database_are_taken_and_nothing_else() -> None:
    for zone in ("Europe/Vienna", "UTC", "America/Argentina/Buenos_Aires", "Asia/Kolkata"):
        assert checked_timezone(zone) == zone
    for wrong in ("", "Vienna", "europe/vienna", "../../etc/passwd", "localtime", "CET+1", "Europe/Vienna\0", "x" * 65):
        with pytest.raises(ValueError, match="`timezone` is not in the IANA database"):
            checked_timezone(wrong)


def test_a_user_is_refused_with_the_field_at_fault() -> None:
    for field, value in (("email", "no"), ("phone", "no"), ("locale", "no_NO"), ("timezone", "no")):
        with pytest.raises(msgspec.ValidationError, match=f"`{field}`"):
            msgspec.json.decode(msgspec.json.encode({field: value}), type=UserFields)


def test_attributes_have_bounds_and_no_text_that_cannot_be_stored() -> None:
    deep: object = 1
    for _ in range(3000):
        deep = [deep]
    for wrong, said in (
        ({"a": "x" * 8200}, "bytes"),
        ({"a": deep}, "levels"),
        ({"a": "x\0y"}, "NUL"),
        ({"\0": 1}, "NUL"),
        ({"a": "\ud800"}, "surrogate"),
        ({"a": {"b": [1, 1e300]}}, "number"),
        ({"a": 2**63}, "number"),
        ({"a": -1e-300}, "number"),
    ):
        with pytest.raises(ValueError, match=f"`attributes`.*{said}"):
            encoded_attributes(wrong)
    assert encoded_attributes({"a": [0, 0.0, -(2**63) + 1, 1e-15, 0.1]})
    assert encoded_attributes({"path": "\\u0000"}) == '{"path":"\\\\u0000"}', "a backslash is no NUL"
    eight: object = 1
    for _ in range(7):
        eight = {"a": eight}
    encoded_attributes({"a": eight})


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-100, 100) | st.text(string.ascii_letters, max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=8,
)
OBJECT = st.dictionaries(st.sampled_from("abc"), JSON, max_size=3)


def by_the_book(target: object, patch: object) -> object:
    """MergePatch of RFC 7396, section 2, word by word."""
    if not isinstance(patch, dict):
        return patch
    if not isinstance(target, dict):
        target = {}
    target = dict(target)
    for name, value in patch.items():
        if value is None:
            if name in target:
                del target[name]
        else:
            target[name] = by_the_book(target.get(name), value)
    return target


@given(OBJECT, OBJECT)
def test_attributes_are_merged_as_rfc_7396_says(target: dict[str, object], patch: dict[str, object]) -> None:
    before = msgspec.json.encode(target)
    assert merged(UserFields(attributes=target), UserPatch(attributes=patch)).attributes == by_the_book(target, patch)
    assert msgspec.json.encode(target) == before, "what was there is not changed in place"


def test_a_patch_changes_what_it_names_and_its_result_is_checked() -> None:
    fields = UserFields(email="a@example.com", locale="de", attributes={"plan": "pro"})
    assert merged(fields, UserPatch()) == fields
    assert merged(fields, UserPatch(email=None, locale="en-us")) == UserFields(
        locale="en-US", attributes={"plan": "pro"}
    )
    assert merged(fields, UserPatch(attributes=None)).attributes == {}
    with pytest.raises(ValueError, match="`phone`"):
        merged(fields, UserPatch(phone="123"))
    for depth in (9, 300, 900):  # below what a parser takes, and beyond what merging would
        with pytest.raises(ValueError, match="`attributes` may be nested 8 levels deep"):
            msgspec.json.decode(b'{"attributes":' + b'{"a":' * depth + b"1" + b"}" * (depth + 1), type=UserPatch)


@pytest.mark.parametrize(
    ("type", "good"),
    [
        (TopicName, "news.sport"),
        (TokenId, "phone"),
        (Reason, "hard_bounce"),
        (Locale, "zh-Hant-TW"),
        (Locale, "default"),
    ],
)
def test_a_name_ends_where_its_text_ends(type: type[str], good: str) -> None:
    assert msgspec.convert(good, type) == good
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(f"{good}\n", type)  # to Python's `$` this is the end, too


@given(st.text(max_size=70), st.from_regex(r"[\w.\u2003\u0085İ-]{1,20}\.[\w-]{2,5}", fullmatch=True))
@example("İ" * 32, "example.com")
@example("a", "exa\u2003mple.com")
def test_whatever_address_a_user_may_have_can_be_suppressed(local: str, domain: str) -> None:
    try:
        email = checked_email(f"{local}@{domain}")
    except ValueError:
        return
    assert NewSuppression(channel="email", address=email, reason="opted_out").address == email


def test_an_address_is_compared_without_its_capital_letters_in_every_alphabet() -> None:
    assert address_hash("email", " JÜRGEN@Bücher.example") == address_hash(
        "email", checked_email("jürgen@BÜCHER.example")
    )
    assert UserFields(email="ÅSA@x.com").email_hash == UserFields(email="åsa@X.COM").email_hash
    assert UserFields().email_hash is None


@pytest.mark.parametrize("domain", [
    "münchen.de", "MÜNCHEN.de", "mu\u0308nchen.de", "xn--mnchen-3ya.de", "XN--MNCHEN-3YA.DE", "münchen。de", "ｍünchen.ｄｅ",
])  # fmt: skip
def test_an_address_is_the_same_however_its_domain_is_written(domain: str) -> None:
    assert address_hash("email", f"alice@{domain}") == address_hash("email", "alice@xn--mnchen-3ya.de")


@given(st.from_regex(r"[a-zA-Zäöüßéñ日本\u0308-]{1,12}\.(de|ÖSTERREICH|рф)", fullmatch=True))
@example("straße.de")
def test_what_is_reported_of_the_address_that_a_mail_went_to_is_found(domain: str) -> None:
    try:
        stored = checked_email(f"Alice@{domain}")
        sent_to = ascii_address(stored)
    except (ValueError, BadAddress):
        return
    assert address_hash("email", sent_to) == address_hash("email", stored) == UserFields(email=stored).email_hash
    assert NewSuppression(channel="email", address=sent_to, reason="opted_out").address == sent_to


def test_the_hash_of_an_address_in_ascii_or_with_a_domain_that_no_mail_can_go_to_is_what_it_was() -> None:
    for address in (
        "alice@example.com",
        "a+b_c@sub.example.co.uk",
        "alice@ex_ample.com",
        "nobody",
        "jürgen@example.com",
        "a@-ü-.de",
        f"a@{'ü' * 70}.de",
        "a@☃_x.de",
    ):
        assert address_hash("email", address.upper()) == sha256(f"email\n{address}".encode()).digest(), address
    assert address_hash("email", "Mu\u0308ller@x.de") != address_hash("email", "Müller@x.de"), "no name is changed"


@pytest.mark.parametrize("wrong", ["", "x" * 129, "a\0b", "\ud800"])
def test_an_id_that_no_log_can_have_is_refused(wrong: str) -> None:
    for checked in (checked_user_id, checked_stored_id):
        with pytest.raises(ValueError, match="`id`"):
            checked(wrong)


@pytest.mark.parametrize("former", ["topic:news", "segment:x"])
def test_an_id_that_nobody_may_have_any_more_is_known_but_not_given(former: str) -> None:
    assert checked_stored_id(former) == former
    with pytest.raises(ValueError, match="`id`: no user may be called"):
        checked_user_id(former)
