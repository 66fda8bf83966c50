"""Files of users: what is read, and that every fault is told with its line, without repeating what it is about."""

import io
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ops import users_file
from ops.users_file import LINE_BYTES_MAX, Form, UsersFile, read_users


def read(text: str | bytes, form: Form) -> UsersFile:
    return read_users(io.BytesIO(text if isinstance(text, bytes) else text.encode()), form, lambda done: None)


def faults(text: str | bytes, form: Form) -> list[tuple[int, str | None]]:
    return [(fault.line, fault.field) for fault in read(text, form).faults]


def test_a_csv_file_says_what_its_columns_say_and_an_empty_cell_takes_away() -> None:
    found = read(
        '\ufeffid,email,attributes.plan,attributes.team\r\nalice,Alice@EXAMPLE.com,pro,"red, blue"\r\n\r\nbob,,,\r\n',
        "csv",
    )
    assert found.faults == []
    alice, bob = found.users
    assert (alice.id, alice.fields.email, alice.fields.attributes) == (
        "alice", "Alice@example.com", {"plan": "pro", "team": "red, blue"})  # fmt: skip
    assert alice.given == bob.given == {"email", "attributes"}
    assert (bob.fields.email, bob.fields.attributes) == (None, {})


@pytest.mark.parametrize(("cell", "value"), [
    ("18", 18), ("0", 0), ("-3", -3), ("12.50", 12.5), ("-0.5", -0.5), ("true", True), ("false", False),
    ("123456789012345", 123456789012345), ("1234567890123456", "1234567890123456"), ("0.1234567890123456", "0.1234567890123456"),
    ("01234", "01234"), ("00", "00"), ("-0", "-0"), ("-0.0", "-0.0"), ("1e3", "1e3"), ("+1", "+1"), (".5", ".5"), ("5.", "5."),
    (" 1", " 1"), ("1 ", "1 "), ("1,5", "1,5"), ("1_000", "1_000"), ("٣", "٣"), ("1٣", "1٣"), ("²", "²"), ("True", "True"),
    ("null", "null"), ("NaN", "NaN"), ("inf", "inf"), ("0x1f", "0x1f"), ("18\n", "18\n"),
])  # fmt: skip
def test_a_cell_of_an_attribute_is_what_it_is_written_as(cell: str, value: object) -> None:
    [user] = read(f'id,attributes.a,attributes.b:text\nalice,"{cell}","{cell}"\n', "csv").users
    found = user.fields.attributes
    assert (found, type(found["a"])) == ({"a": value, "b": cell}, type(value))


def test_other_columns_are_texts_and_one_attribute_stands_in_one_column() -> None:
    [user] = read("id,attributes.a\n17,1\n", "csv").users
    assert user.id == "17"
    for header in ("id,attributes.a,attributes.a:text", "id,attributes.:text", "id:text", "id,email:text"):
        assert [fault.line for fault in read(f"{header}\nalice,1,1\n", "csv").faults] == [1], header


def test_a_line_of_ndjson_says_what_it_has_and_null_takes_away() -> None:
    found = read(
        '{"id":"alice","locale":"de-at","attributes":{"n":1}}\n\n{"id":"bob","phone":null,"attributes":null}\n',
        "ndjson",
    )
    assert found.faults == []
    alice, bob = found.users
    assert (alice.given, alice.fields.locale) == ({"locale", "attributes"}, "de-AT")
    assert (bob.given, bob.fields.phone, bob.fields.attributes) == ({"phone", "attributes"}, None, {})


def test_every_fault_of_a_csv_file_is_told_with_its_line() -> None:
    text = (
        'id,email,phone\nalice,nobody,\n"bob\nbrown",bob@example.com,\ncarol,,0664\ndave,,,\n,x@example.com,\nalice,,\n'
    )
    assert faults(text, "csv") == [(2, "email"), (5, "phone"), (6, None), (7, "id")]
    assert faults("id\nbob\nalice\nbob\n", "csv") == [(4, "id")]
    assert "line 2" in read("id\nbob\nalice\nbob\n", "csv").faults[0].detail


def test_every_fault_of_an_ndjson_file_is_told_with_its_line() -> None:
    lines: list[Any] = ['{"id":"a"}', "nonsense", '{"id":1}', '{"email":"a@example.com"}', '{"id":"b","mail":"x"}',
                        '{"id":"c","timezone":"Vienna"}', '{"id":"topic:x"}', '{"id":"a"}', "[" * 5000, b"\xff\xfe"]  # fmt: skip
    text = b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines)
    assert [line for line, _ in faults(text, "ndjson")] == list(range(2, 11))
    assert [field for _, field in faults(text, "ndjson")][1:7] == ["id", "id", "mail", "timezone", "id", "id"]


@pytest.mark.parametrize("header", ["", "email", "id,mail", "id,id", "id,attributes.", "Id"])
def test_a_header_that_is_none_is_the_only_fault(header: str) -> None:
    found = read(f"{header}\nalice,x\nbob,y\n", "csv")
    assert (found.users, [fault.line for fault in found.faults]) == ([], [1])


def test_a_file_that_is_no_text_or_ends_within_a_quote_is_told() -> None:
    assert faults(b"id,email\nalice,\nb\xff,\n", "csv") == [(3, None)]
    assert faults('id,email\nalice,"x', "csv") == [(2, None)]
    assert faults(b"\xff\xfe", "csv") == [(1, None)]


def test_what_other_programs_write_is_read_or_refused_with_what_to_do() -> None:
    assert [user.id for user in read(b'\xef\xbb\xbf{"id":"alice"}\r\n{"id":"bob"}', "ndjson").users] == ["alice", "bob"]
    for text, said in (
        ("id;email\nalice;a@example.com\n", "commas"),
        ("id\temail\nalice\ta@example.com\n", "commas"),
        ("id,email\ralice,a@example.com\r", "end lines with"),
        ("id,email\nalice,a@example.com\n".encode("utf-16"), "UTF-8"),
        ("id,attributes.name\nalice,Jürgen\n".encode("latin-1"), "UTF-8"),
    ):
        found = read(text, "csv")
        assert said in found.faults[0].detail, text
    assert [fault.line for fault in read('[\n{"id":"alice"},\n]', "ndjson").faults] == [1, 2, 3]


@pytest.mark.parametrize("form", ["csv", "ndjson"])
def test_a_line_without_end_is_not_read_into_memory(form: Form) -> None:
    class Endless(io.RawIOBase):
        given = 0

        def readable(self) -> bool:
            return True

        def readinto(self, buffer: Any) -> int:
            buffer[:] = b"x" * len(buffer)
            self.given += len(buffer)
            return len(buffer)

    source = Endless()
    found = read_users(io.BufferedReader(source), form, lambda done: None)
    assert found.users == []
    assert found.faults
    assert source.given < 4 * LINE_BYTES_MAX


def test_whoever_watches_is_told_how_many_bytes_of_the_file_have_been_read() -> None:
    told: list[int] = []
    text = "id\n" + "".join(f"u{n:05}\n" for n in range(3000))
    read_users(io.BytesIO(text.encode()), "csv", told.append)
    assert told == sorted(told)
    assert len(told) > 2
    assert told[-1] == len(text)


def test_a_file_has_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(users_file, "USERS_MAX", 3)
    monkeypatch.setattr(users_file, "FAULTS_MAX", 2)
    assert "split it" in read("id\n" + "".join(f"u{n}\n" for n in range(9)), "csv").faults[-1].detail
    assert len(read("id\n" + "\n".join(["topic:x"] * 9), "csv").faults) == 2


CELL = st.text(st.characters(codec="utf-8", exclude_characters="\0\r\n"), min_size=1, max_size=8)


@given(st.lists(st.tuples(CELL, st.dictionaries(CELL, CELL, max_size=2)), max_size=5))
def test_what_json_writes_is_read_whole_or_told(rows: list[tuple[str, dict[str, str]]]) -> None:
    text = "".join(json.dumps({"id": id, "attributes": attributes}) + "\n" for id, attributes in rows)
    found = read(text, "ndjson")
    assert len(found.users) + len(found.faults) == len(rows)
    assert len({user.id for user in found.users}) == len(found.users)
    for user in found.users:
        assert (user.id, user.fields.attributes) in rows
    for fault in found.faults:
        assert fault.detail.startswith("`id`"), "nothing else can be wrong with them"


@given(st.binary(max_size=200), st.sampled_from(["csv", "ndjson"]))
def test_no_file_however_strange_ends_the_reader(data: bytes, form: Form) -> None:
    found = read(data, form)
    assert all(fault.line >= 1 and fault.detail for fault in found.faults)
