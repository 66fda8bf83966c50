"""A file of users to import, CSV or NDJSON: read whole and checked, each fault with its line.

No message repeats what it is about, which may be somebody's address.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Final, Literal

import msgspec
from msgspec import UNSET

from engine.directory.bulk import FIELDS, ImportedUser
from engine.directory.users import UserFields, UserPatch, checked_user_id

Form = Literal["csv", "ndjson"]

USERS_MAX: Final = 500_000
"""Users of one file: they are held in memory, and stored in one transaction."""

FAULTS_MAX: Final = 10_000
"""Faults that are told; a file with more is the wrong file."""

LINE_BYTES_MAX: Final = 1 << 20
"""A line with more is no user, and the file perhaps one endless line: memory must not depend on it."""

LINES_PER_LOOK: Final = 1000
BOM: Final = b"\xef\xbb\xbf"
_ATTRIBUTE: Final = "attributes."

TEXT: Final = ":text"
"""What a column of attributes ends with whose cells are texts, whatever they look like."""

_NUMBER: Final = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?", re.ASCII)

DIGITS_MAX: Final = 15
"""Of a cell that is a number: so many are the same in every program that reads JSON. What has more is an id."""


class Fault(msgspec.Struct, frozen=True, omit_defaults=True):
    """What is wrong in a line. `field`: the member or column at fault, if it is one."""

    line: int
    detail: str
    field: str | None = None


class UsersFile(msgspec.Struct, frozen=True):
    """What a file holds. With any fault nothing of it may be imported."""

    users: list[ImportedUser]
    faults: list[Fault]


class _Line(UserPatch, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A line of NDJSON."""

    id: str


_decode: Final = msgspec.json.Decoder(_Line).decode


FORMS: Final[dict[str, Form]] = {"csv": "csv", "ndjson": "ndjson", "jsonl": "ndjson"}
"""By what a file's name ends with."""


def form_of(path: Path) -> Form | None:
    """The form that a file's name tells."""
    return FORMS.get(path.suffix.lower().removeprefix("."))


def read_users(file: IO[bytes], form: Form, progress: Callable[[int], None]) -> UsersFile:
    """Read and check a file.

    Args:
        file: open for reading bytes.
        progress: told how many bytes have been read, now and then.
    """
    read = _csv if form == "csv" else _ndjson
    users: list[ImportedUser] = []
    faults: list[Fault] = []
    lines: dict[str, int] = {}
    for line, given in read(_lines(file, progress)):
        found = given
        if isinstance(given, ImportedUser) and given.id in lines:
            found = Fault(line, f"`id` stands in line {lines[given.id]} as well: leave one of the two out", "id")
        if isinstance(found, Fault):
            faults.append(found)
        else:
            lines[found.id] = line
            users.append(found)
        if len(users) > USERS_MAX:
            faults.append(Fault(line, f"a file may have {USERS_MAX} users: split it, the order does not matter"))
        if len(users) > USERS_MAX or len(faults) >= FAULTS_MAX:
            break
    return UsersFile(users, faults)


def _lines(file: IO[bytes], progress: Callable[[int], None]) -> Iterator[bytes]:
    """The lines of a file, without what some editors put before the first. One that is too long is the last, and cut."""
    done = number = 0
    while text := file.readline(LINE_BYTES_MAX + 1):
        number, done = number + 1, done + len(text)
        yield text.removeprefix(BOM) if number == 1 else text
        if number % LINES_PER_LOOK == 0:
            progress(done)
        if len(text) > LINE_BYTES_MAX:
            break
    progress(done)


def _ndjson(lines: Iterable[bytes]) -> Iterator[tuple[int, ImportedUser | Fault]]:
    for line, text in enumerate(lines, 1):
        if not text.strip():
            continue
        try:
            given = _decode(text)
        except msgspec.ValidationError as error:
            yield line, _fault(line, str(error))
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            yield line, Fault(line, "this line is no JSON object: write one for each user, each on a line of its own")
        else:
            values = {name: getattr(given, name) for name in FIELDS}
            yield line, _user(line, given.id, {name: one for name, one in values.items() if one is not UNSET})


def _csv(lines: Iterable[bytes]) -> Iterator[tuple[int, ImportedUser | Fault]]:
    begins = 1
    try:
        rows = csv.reader((text.decode() for text in lines), strict=True)
        header = next(rows, [])
        if fault := _header_fault(header):
            yield 1, fault
            return
        begins = rows.line_num + 1  # a cell may hold line breaks
        for row in rows:
            line, begins = begins, rows.line_num + 1
            if not row:
                continue
            if len(row) != len(header):
                yield (
                    line,
                    Fault(line, f"this line has {len(row)} cells, the header {len(header)}: quote cells with commas"),
                )
                continue
            yield line, _user(line, *_cells(header, row))
    except UnicodeDecodeError:
        yield begins, Fault(begins, "the file is not in UTF-8 from here on: save it so")
    except csv.Error as error:
        why = "lines end with \\r alone" if "new-line" in str(error) else str(error)
        yield (
            begins,
            Fault(begins, f"this is no CSV from here on ({why}): close every quote, end lines with \\n or \\r\\n"),
        )


def _header_fault(header: list[str]) -> Fault | None:
    known = ("id", *FIELDS[:-1])
    names = [_without_mark(name) for name in header]
    wrong = [name for name in names if name not in known and not (name.startswith(_ATTRIBUTE) and name != _ATTRIBUTE)]
    twice = [name for name in names if names.count(name) > 1]
    if len(header) == 1 and (found := next((one for one in ";\t" if one in header[0]), None)):
        return Fault(1, f"cells are separated by {found!r} here: save the file with commas between them")
    if "id" not in header:
        return Fault(
            1,
            f"the first line must name the columns: `id`, and any of {', '.join(FIELDS[:-1])}, attributes.<name>",
            "id",
        )
    if wrong or twice:
        said = "stands there twice" if twice else f"is none of {', '.join(known)}, attributes.<name>"
        return Fault(1, f"the column `{(twice or wrong)[0][:80]}` {said}", (twice or wrong)[0][:80])
    return None


def _cells(header: list[str], row: list[str]) -> tuple[str, dict[str, object]]:
    """The id and the fields of a row. An empty cell takes away what is stored."""
    cells = dict(zip(header, row, strict=True))
    fields: dict[str, object] = {name: cells[name] or None for name in FIELDS[:-1] if name in cells}
    attributes = {name: cell for name, cell in cells.items() if name.startswith(_ATTRIBUTE)}
    if attributes:
        fields[FIELDS[-1]] = {
            _without_mark(name).removeprefix(_ATTRIBUTE): cell if name.endswith(TEXT) else value_of(cell)
            for name, cell in attributes.items()
            if cell
        }
    return cells["id"], fields


def _without_mark(column: str) -> str:
    return column.removesuffix(TEXT) if column.startswith(_ATTRIBUTE) else column


def value_of(cell: str) -> str | int | float | bool:
    """What a cell of an attribute says: a number or a truth value where it is written as one, else its text.

    A number has no leading zero, no exponent, no plus sign and at most `DIGITS_MAX` digits; truth values are in small letters.
    """
    if cell in ("true", "false"):
        return cell == "true"
    if _NUMBER.fullmatch(cell) is None or sum(map(str.isdigit, cell)) > DIGITS_MAX:
        return cell
    number = float(cell) if "." in cell else int(cell)
    return cell if cell.startswith("-") and not number else number  # there is no `-0`


def _user(line: int, id: str, given: dict[str, object]) -> ImportedUser | Fault:
    if given.get("attributes", UNSET) is None:
        given["attributes"] = {}
    try:
        return ImportedUser(checked_user_id(id), UserFields(**given), frozenset(given))  # type: ignore[arg-type]
    except ValueError as error:
        return _fault(line, str(error))


def _fault(line: int, said: str) -> Fault:
    """A fault whose text names its member: ours begin with it, msgspec's end with its path."""
    _, at, path = said.rpartition(" - at `$.")
    named = path.rstrip("`") if at else "".join(said.split("`", 2)[1:2])
    return Fault(line, said, named or None)
