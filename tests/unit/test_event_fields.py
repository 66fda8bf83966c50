"""The fields of an event that `seamark publish` takes: all of them, from options and from a file, each refused by name."""

import inspect
import io
import json
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.plan.rules import CHANNELS
from ops.cli.event_fields import OPTIONS, event_of_options, read_event
from ops.cli.publish import publish
from seamark import Publisher
from seamark.protocol import events
from seamark.protocol.errors import InvalidEvent
from seamark.protocol.events import Event, accept, encode

NEEDED = {"to": ["alice"], "type": "demo.hello"}
EVERY_FIELD = {
    "id": "e1",
    "to": ["alice", "bob"],
    "data": '{"text":"hi"}',
    "source": "shop",
    "time": "2026-01-31T12:00:00Z",
    "tenant": "acme",
    "type": "order.shipped",
    "subject": "order-17",
    "priority": "high",
    "category": "orders",
    "semantics": "effectively_once",
    "ordering_key": "order-17",
    "collapse_key": "order-17",
    "expires_at": "2036-01-31T12:00:00+01:00",
    "send_at": "2026-01-31T12:00:00+01:00",
    "channels": ["inapp", "email"],
    "transaction_id": "t1",
}


def file_with(folder: Path, content: Any) -> str:
    path = folder / "event.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def test_the_command_has_an_option_for_every_field_of_an_event() -> None:
    parameters = inspect.signature(publish, eval_str=True).parameters.values()
    options = {parameter.annotation.__metadata__[0].default for parameter in parameters}
    assert {OPTIONS.get(name, f"--{name.replace('_', '-')}") for name in Event.__struct_fields__} <= options
    assert EVERY_FIELD.keys() == set(Event.__struct_fields__)


def test_events_may_name_the_channels_that_there_are() -> None:
    assert events.CHANNELS == CHANNELS


def test_every_field_given_as_an_option_is_in_the_event() -> None:
    fields = event_of_options(EVERY_FIELD)
    tenant, key = fields.pop("tenant"), fields.pop("ordering_key")
    encoded = encode(tenant=tenant, key=key, **fields)
    accepted = accept(f"ev.0.{encoded.subject.removeprefix('events.')}", encoded.payload)
    said = json.loads(msgspec.json.encode(accepted.event))
    for name in EVERY_FIELD.keys() - {"tenant", "ordering_key", "type", "data", "time", "expires_at", "send_at"}:
        assert said[name] == EVERY_FIELD[name], name
    assert (accepted.at.tenant, accepted.at.key, accepted.at.type) == ("acme", "order-17", "order.shipped")
    assert said["data"] == {"text": "hi"}
    assert accepted.event.time == datetime(2026, 1, 31, 12, tzinfo=UTC)


def test_a_file_gives_the_same_event_as_options_and_keeps_fields_that_nobody_knows(tmp_path: Path) -> None:
    path = file_with(tmp_path, {**EVERY_FIELD, "data": {"text": "hi"}, "x-later": {"a": [1]}})
    fields = read_event(path, dict.fromkeys(EVERY_FIELD))
    assert json.loads(bytes(fields.pop("x-later"))) == {"a": [1]}
    wanted = event_of_options(EVERY_FIELD)
    assert json.loads(bytes(fields.pop("data"))) == json.loads(bytes(wanted.pop("data")))
    assert fields == wanted


def test_an_option_wins_over_the_file(tmp_path: Path) -> None:
    fields = read_event(file_with(tmp_path, NEEDED), {"to": ["bob"], "priority": "low", "type": None})
    assert (fields["to"], fields["type"], fields["priority"]) == (["bob"], "demo.hello", "low")


def test_a_dash_reads_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(json.dumps(NEEDED).encode())))
    assert read_event("-", {}) == NEEDED


@pytest.mark.parametrize(
    ("options", "field", "remedy"),
    [
        ({"time": "yesterday"}, "time", "2026-01-31T12:00:00Z"),
        ({"expires_at": "tomorrow"}, "expires_at", "2026-01-31T12:00:00Z"),
        ({"priority": "urgent"}, "priority", "critical, high, normal, low"),
        ({"semantics": "exactly_once"}, "semantics", "effectively_once"),
        ({"data": "{"}, "data", "--data @file"),
        ({"data": "@nothing"}, "data", "nothing"),
        ({"channels": ["x"] * 17}, "channels", "--channel"),
        ({"category": "x" * 129}, "category", "--category"),
        ({"tenant": ""}, "tenant", "`tenant`"),
        ({"ordering_key": "x" * 129}, "ordering_key", "`ordering_key`"),
        ({"type": "order shipped"}, "type", "dot-separated"),
        ({"to": None}, "to", "--to alice"),
        ({"type": None}, "type", "--type order.shipped"),
    ],
)
def test_an_option_that_cannot_be_is_refused_with_its_field_and_the_remedy(
    options: dict[str, Any], field: str, remedy: str
) -> None:
    with pytest.raises(InvalidEvent) as refused:
        event_of_options(NEEDED | options)
    assert refused.value.reason == field
    assert remedy in refused.value.detail


@pytest.mark.parametrize(
    ("content", "field", "remedy"),
    [
        ("[]", "file", "one event, a JSON object"),
        ("{", "file", "one event, a JSON object"),
        (NEEDED | {"to": "alice"}, "to", '"to": ["alice"]'),
        (NEEDED | {"time": 17}, "time", "RFC 3339"),
        (NEEDED | {"key": "k"}, "key", "`ordering_key`"),
        ({"type": "demo"}, "to", "--to alice"),
        ({"to": ["alice"]}, "type", "--type"),
    ],
)
def test_a_file_that_holds_no_event_is_refused_with_the_field_and_the_remedy(
    tmp_path: Path, content: Any, field: str, remedy: str
) -> None:
    with pytest.raises(InvalidEvent) as refused:
        read_event(file_with(tmp_path, content), {})
    assert refused.value.reason == field
    assert remedy in refused.value.detail


def test_a_file_that_is_not_there_is_named() -> None:
    with pytest.raises(InvalidEvent, match="nowhere cannot be read"):
        read_event("nowhere", {})


@pytest.mark.parametrize("name", ["to", "ordering_key", "key"])
async def test_what_is_an_argument_of_a_publisher_is_refused_as_an_extra_field(name: str) -> None:
    publisher = Publisher(nats_url="nats://127.0.0.1:1")
    with pytest.raises(InvalidEvent, match=f"`{name}` is no extra field"):
        await publisher.publish(to=["alice"], type="demo.hello", extra={name: "x"})


@given(st.dictionaries(st.sampled_from(Event.__struct_fields__), st.text(max_size=5) | st.lists(st.text(max_size=5))))
def test_whatever_options_hold_they_are_an_event_or_refused_by_a_field(options: dict[str, Any]) -> None:
    if "data" in options and not isinstance(options["data"], str):
        del options["data"]
    refused = None
    try:
        fields = event_of_options(options)
    except InvalidEvent as error:
        refused = error
    if refused is None:
        assert fields.keys() == options.keys()
    else:
        assert refused.reason in Event.__struct_fields__
