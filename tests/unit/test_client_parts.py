"""The small parts of the Python SDK: progress, cursor stores, backoff, tokens, close codes, the mailbox."""

from __future__ import annotations

import asyncio
import base64
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway import close_codes
from seamark.client.backoff import Backoff
from seamark.client.closecodes import Verdict, code_of_status, error_of, verdict
from seamark.client.cursorstore import BadCursorFile, FileCursor, MemoryCursor
from seamark.client.errors import Forbidden, NotAuthenticated, ProtocolError, TooManySessions
from seamark.client.frames import decode_frame
from seamark.client.mailbox import Mailbox
from seamark.client.progress import Progress
from seamark.client.session import endpoint
from seamark.client.token import TokenSource, expiry_of, refresh_delay

# --- progress -----------------------------------------------------------------------------------------------------


@given(st.lists(st.sampled_from(["take", "pass", "done", "done early"]), max_size=60))
def test_the_stored_cursor_never_passes_a_record_that_is_not_done(script):
    progress, seq = Progress(), 0
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
    progress = Progress()
    first, second = progress.taken("e.1"), progress.taken("e.2")
    assert progress.done(second, "e.2")
    assert not progress.done(first, "e.1")
    assert progress.cursor == "e.2"


# --- cursor stores ------------------------------------------------------------------------------------------------


async def test_a_file_keeps_the_cursor_whole_and_a_second_object_reads_it(tmp_path: Path):
    path = tmp_path / "deep" / "cursor.json"
    assert await FileCursor(path).load() is None
    await FileCursor(path).save("abc.17")
    await FileCursor(path).save("abc.18")
    assert await FileCursor(path).load() == "abc.18"
    assert [one.name for one in path.parent.iterdir()] == ["cursor.json"]


async def test_a_save_that_fails_leaves_the_old_cursor_and_no_litter(tmp_path: Path, monkeypatch):
    store = FileCursor(tmp_path / "cursor.json")
    await store.save("abc.17")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        await store.save("abc.18")
    assert await store.load() == "abc.17"
    assert [one.name for one in tmp_path.iterdir()] == ["cursor.json"]


@pytest.mark.parametrize("content", [b"", b"{}", b'{"cursor": 5}', b"\xff\xfe", b"[]"])
async def test_a_damaged_cursor_file_is_an_error_and_never_a_silent_fresh_start(tmp_path: Path, content):
    path = tmp_path / "cursor.json"
    path.write_bytes(content)
    with pytest.raises(BadCursorFile, match="Remove it"):
        await FileCursor(path).load()


async def test_memory_keeps_the_cursor():
    store = MemoryCursor()
    await store.save("e.1")
    assert await store.load() == "e.1"


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
    assert expiry_of(jwt(exp=1700000000)) == 1700000000
    assert [expiry_of(token) for token in (jwt(sub="a"), "opaque", "a.b", "a.%%.c", "", jwt(exp="x"))] == [None] * 6


@given(st.floats(min_value=0, max_value=1e7))
def test_a_refresh_is_due_before_the_end_but_not_in_a_tight_loop(lifetime):
    delay = refresh_delay(lifetime)
    assert delay >= 1
    assert delay < lifetime or lifetime <= 2


async def test_a_refused_static_token_is_final():
    source = TokenSource("t")
    assert await source.next() == "t"
    source.refused()
    with pytest.raises(NotAuthenticated):
        await source.next()


async def test_a_callable_gets_three_tries_and_a_token_refused_before_is_not_presented_again():
    given = iter(["a", "b", "c", "d"])

    async def fresh() -> str:
        return next(given)

    source = TokenSource(fresh)
    for _ in range(3):
        await source.next()
        source.refused()
    with pytest.raises(NotAuthenticated):
        await source.next()
    same = TokenSource(lambda: "same")
    await same.next()
    same.refused()
    with pytest.raises(NotAuthenticated):
        await same.next()


# --- close codes --------------------------------------------------------------------------------------------------


def test_the_client_obeys_the_gateways_own_table():
    for row in close_codes.TABLE:
        if row.code == 4401:  # a token problem is asked about first
            continue
        assert (verdict(row.code) is Verdict.RECONNECT) == row.reconnect, row
    assert verdict(4401) is Verdict.RENEW


def test_codes_and_statuses_map_to_errors_an_app_can_tell_apart():
    assert isinstance(error_of(4403, ""), Forbidden)
    assert isinstance(error_of(4409, ""), TooManySessions)
    assert isinstance(error_of(4400, "bad"), ProtocolError)
    assert "4400: bad" in str(error_of(4400, "bad"))
    assert [code_of_status(status) for status in (401, 403, 404, 429, 503)] == [4401, 4403, 4400, 4429, 1006]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"op":5}', '{"op":"record"}', '{"op":"live"}', b"\xff"])
def test_what_is_no_frame_is_a_protocol_error(text):
    with pytest.raises(ProtocolError):
        decode_frame(text)


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
