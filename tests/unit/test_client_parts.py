"""The small parts of the Python SDK: progress, cursor stores, backoff, tokens, close codes, the mailbox."""

from __future__ import annotations

import asyncio
import base64
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seamark.backoff import Backoff
from seamark.client.cursorstore import Bookmark, FileCursor, MemoryCursor
from seamark.client.errors import NotAuthenticated, TooManySessions, UserChanged, error_of
from seamark.client.keeper import Keeper
from seamark.client.mailbox import Mailbox
from seamark.client.session import endpoint
from seamark.client.token import Claims, TokenSource, claims_of, refresh_delay
from seamark.protocol import close_codes
from seamark.protocol.errors import InvalidCursor

# --- progress -----------------------------------------------------------------------------------------------------


@given(st.lists(st.sampled_from(["take", "pass", "done", "done early"]), max_size=60))
def test_the_stored_cursor_never_passes_a_record_that_is_not_done(script):
    progress, seq = Keeper(MemoryCursor()), 0
    open_: list[tuple[int, int]] = []
    for step in script:
        if step == "take":
            seq += 1
            open_.append((progress.taken(f"e.{seq}"), seq))
        elif step == "pass":
            seq += 1
            progress.passed(f"e.{seq}")
        elif open_:
            upto = len(open_) - 1 if step == "done" else 0
            assert progress.done(open_[upto][0], f"e.{open_[upto][1]}")
            del open_[: upto + 1]
        stored = int(progress.cursor.split(".")[1]) if progress.cursor else 0
        assert stored < (open_[0][1] if open_ else seq + 1)
        if not open_ and progress.cursor:
            assert stored == seq


def test_done_twice_changes_nothing():
    progress = Keeper(MemoryCursor())
    first, second = progress.taken("e.1"), progress.taken("e.2")
    assert progress.done(second, "e.2")
    assert not progress.done(first, "e.1")
    assert progress.cursor == "e.2"


# --- cursor stores ------------------------------------------------------------------------------------------------


async def test_a_file_keeps_the_cursor_whole_and_a_second_object_reads_it(tmp_path: Path):
    path = tmp_path / "deep" / "cursor.json"
    assert await FileCursor(path).load() is None
    await FileCursor(path).save(Bookmark("abc.17", "t", "alice"))
    await FileCursor(path).save(Bookmark("abc.18", "t", "alice"))
    assert await FileCursor(path).load() == Bookmark("abc.18", "t", "alice")
    assert [one.name for one in path.parent.iterdir()] == ["cursor.json"]


async def test_a_save_that_fails_leaves_the_old_cursor_and_no_litter(tmp_path: Path, monkeypatch):
    store = FileCursor(tmp_path / "cursor.json")
    await store.save(Bookmark("abc.17"))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        await store.save(Bookmark("abc.18"))
    assert await store.load() == Bookmark("abc.17")
    assert [one.name for one in tmp_path.iterdir()] == ["cursor.json"]


@pytest.mark.parametrize("content", [b"", b"{}", b'{"cursor": 5}', b"\xff\xfe", b"[]"])
async def test_a_damaged_cursor_file_is_an_error_and_never_a_silent_fresh_start(tmp_path: Path, content):
    path = tmp_path / "cursor.json"
    path.write_bytes(content)
    with pytest.raises(InvalidCursor, match="Remove it"):
        await FileCursor(path).load()


async def test_memory_keeps_the_cursor():
    store = MemoryCursor()
    await store.save(Bookmark("e.1", "t", "alice"))
    assert await store.load() == Bookmark("e.1", "t", "alice")
    assert store.cursor == "e.1"


async def test_a_cursor_file_of_an_older_version_is_a_bookmark_of_whoever_comes(tmp_path: Path):
    path = tmp_path / "cursor.json"
    path.write_text('{"cursor": "abc.17"}')
    assert await FileCursor(path).load() == Bookmark("abc.17")


# --- backoff ------------------------------------------------------------------------------------------------------


def test_waits_double_up_to_the_bound_and_begin_anew_after_success():
    backoff = Backoff(first_seconds=1, max_seconds=6, rng=lambda: 1.0)
    assert [backoff.next_seconds() for _ in range(5)] == [1, 2, 4, 6, 6]
    backoff.succeeded()
    assert backoff.next_seconds() == 1


def test_jitter_is_full():
    assert Backoff(rng=lambda: 0.0).next_seconds() == 0.0
    waits = [Backoff(first_seconds=1).next_seconds() for _ in range(300)]
    assert min(waits) < 0.1
    assert max(waits) > 0.9


# --- tokens -------------------------------------------------------------------------------------------------------


def jwt(**claims: object) -> str:
    body = base64.urlsafe_b64encode(json.dumps(claims).encode()).rstrip(b"=").decode()
    return f"e30.{body}.sig"


def test_the_expiry_is_read_without_verifying_and_anything_else_has_none():
    assert claims_of(jwt(exp=1700000000, sub="alice", aud=["x"])) == Claims(exp=1700000000.0, sub="alice")
    others = ("opaque", "a.b", "a.%%.c", "a.ä.c", "", "a.bnVsbA.c", jwt(exp="x"), jwt(exp=True))
    assert [claims_of(token) for token in others] == [Claims()] * len(others)


@given(st.floats(min_value=0, max_value=1e7))
def test_a_refresh_is_due_before_the_end_but_not_in_a_tight_loop(lifetime):
    delay = refresh_delay(lifetime)
    assert delay >= 1
    assert delay < lifetime or lifetime <= 2


async def test_three_refusals_in_a_row_are_final_whatever_the_tokens():
    for source in (TokenSource("t"), TokenSource(lambda: "same"), TokenSource(iter("abcd").__next__)):
        for _ in range(3):
            assert await source.next()
            source.refused()
        with pytest.raises(NotAuthenticated):
            await source.next()
    accepted = TokenSource("t")
    for _ in range(9):
        await accepted.next()
        accepted.refused()
        accepted.accepted()
    assert await accepted.next() == "t"


async def test_a_static_token_that_has_expired_is_final_at_the_first_refusal():
    source = TokenSource(jwt(exp=1000), clock=lambda: 1001)
    await source.next()
    source.refused()
    with pytest.raises(NotAuthenticated):
        await source.next()


async def test_the_source_is_asked_only_when_there_is_no_token_or_it_has_expired_or_was_refused():
    now, given = 1000.0, iter([jwt(exp=1100, n=1), jwt(exp=1200, n=2), jwt(exp=1300, n=3)])
    tokens = TokenSource(lambda: next(given), clock=lambda: now)
    first = await tokens.next()
    assert await tokens.next() == first
    tokens.refused()
    second = await tokens.next()
    assert second != first
    tokens.accepted()
    assert await tokens.next() == second
    now = 1195.0
    assert await tokens.next() not in (first, second)


async def test_a_token_of_another_user_is_not_used():
    given = iter([jwt(sub="alice", tenant="t", exp=9e9), jwt(sub="bob", tenant="t", exp=9e9)])
    tokens = TokenSource(lambda: next(given))
    alices = await tokens.next()
    with pytest.raises(UserChanged):
        await tokens.fresh()
    assert tokens.current == alices


async def test_a_token_that_is_no_text_is_refused_with_a_clear_error():
    for wrong in (None, "", 5):
        with pytest.raises(TypeError, match="as text"):
            await TokenSource(lambda given=wrong: given).next()


def test_a_clock_that_is_ahead_does_not_make_the_client_ask_every_second():
    ahead = TokenSource(lambda: "", clock=lambda: 1e10)
    ahead.current = jwt(exp=1000, iat=100)
    assert ahead.refresh_in_seconds() == refresh_delay(900)
    ahead.current = jwt(exp=1000)
    assert ahead.refresh_in_seconds() is None


# --- close codes --------------------------------------------------------------------------------------------------


def test_documentation_gateway_and_both_sdks_have_one_table_of_close_codes():
    root = Path(__file__).parents[2]
    rows = re.findall(r"^\| (\d{4}) \| ?`?(\w*)`? \| (\w+)", (root / "docs/protocol.md").read_text(), re.MULTILINE)
    documented = {(int(code), name, then == "reconnect") for code, name, then in rows}
    assert documented - {(1009, "", False)} == {(row.code, row.name, row.reconnect) for row in close_codes.TABLE}
    stops = {code for code, _, reconnect in documented if not reconnect} - {4401}
    assert stops == close_codes.STOP
    script = (root / "gateway/web/seamark.js").read_text()
    tables = {
        name: dict(
            re.findall(r"(\d+): (\"[^\"]*\"|\d+)", re.search(rf"const {name} = {{(.*?)}};", script, re.DOTALL)[1])
        )  # type: ignore[index]
        for name in ("STOP", "CODE_OF_STATUS")
    }
    assert set(map(int, tables["STOP"])) == stops
    assert {int(status): int(code) for status, code in tables["CODE_OF_STATUS"].items()} == close_codes.CODE_OF_STATUS


def test_codes_and_statuses_map_to_errors_an_app_can_tell_apart():
    assert isinstance(error_of(4401, ""), NotAuthenticated)
    assert isinstance(error_of(4409, ""), TooManySessions)
    assert str(error_of(4403, "bad")).endswith("(close code 4403: the token does not allow this; bad)")
    codes = [close_codes.CODE_OF_STATUS.get(status) for status in (401, 403, 404, 429, 503)]
    assert codes == [4401, 4403, 4400, 4429, None]


def test_an_address_may_be_the_gateway_or_its_endpoint_and_nothing_else():
    assert endpoint("https://a.example") == "https://a.example/v1/ws"
    assert endpoint("https://a.example/notify/") == "https://a.example/notify/v1/ws"
    assert endpoint("wss://a.example/v1/ws") == "wss://a.example/v1/ws"
    for wrong in ("", "a.example", "nats://a", "http://"):
        with pytest.raises(ValueError, match="gateway address"):
            endpoint(wrong)


# --- the mailbox --------------------------------------------------------------------------------------------------


async def test_a_full_mailbox_makes_the_writer_wait_and_loses_nothing():
    box: Mailbox[int] = Mailbox(items_max=3, bytes_max=10)

    async def fill() -> None:
        for number in range(20):
            await box.put(number, 4)
        box.end()

    filling = asyncio.create_task(fill(), name="fill")
    got = []
    for _ in range(20):
        got.append(await box.get())
        assert len(box) <= 2
    await filling
    assert got == list(range(20))
    with pytest.raises(StopAsyncIteration):
        await box.get()


async def test_an_item_larger_than_the_bound_passes_alone_and_an_error_comes_after_what_was_there():
    box: Mailbox[str] = Mailbox(items_max=3, bytes_max=10)
    await box.put("huge", 1000)
    box.end(ValueError("over"))
    assert await box.get() == "huge"
    with pytest.raises(ValueError, match="over"):
        await box.get()


# --- the package --------------------------------------------------------------------------------------------------


def test_importing_seamark_loads_nothing_heavy():
    code = "import sys, seamark; print(sorted({'aiohttp', 'nats', 'msgspec', 'opentelemetry'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_every_public_name_is_there():
    import seamark

    assert all(getattr(seamark, name) for name in seamark.__all__)
    assert {"Publisher", "connect"} <= set(dir(seamark))
    with pytest.raises(AttributeError):
        _ = seamark.nonsense
