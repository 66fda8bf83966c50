"""What a rate needs, and that the shipped production files hold the rate they are said to hold."""

import re
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import TopologyError
from engine.topology.files import files_folder, is_log, render
from engine.topology.size import LOG_BYTES_COMFORTABLE, Demand, size, write

SHIPPED = Demand(rate=250, record_bytes=450, days=30)
"""What `nats/server.conf` and docs/operations.md say."""

DAY = 86_400

demands = st.builds(
    Demand,
    rate=st.floats(0.01, 100_000),
    record_bytes=st.integers(1, 1 << 20),
    days=st.floats(8, 3650),
    receipts_per_record=st.floats(0, 10),
    planned_share=st.floats(0, 1),
    users=st.integers(1, 10**9),
    servers=st.integers(3, 30),
)


def test_the_shipped_production_files_are_those_of_the_rate_that_is_stated(tmp_path: Path) -> None:
    assert write(size(SHIPPED), tmp_path / "nats") == []  # nothing had to be changed


def test_the_stated_rate_stands_where_people_choose_a_server() -> None:
    assert "250 records/s of 450 bytes" in (files_folder() / "server.conf").read_text()


def test_ten_thousand_records_a_second_for_thirty_days_have_room_in_what_is_reckoned() -> None:
    found = size(Demand(rate=10_000, record_bytes=450, days=30))
    log = next(each for each in found.streams if each.name == "LOG-p")
    assert log.count * log.max_bytes > 10_000 * 30 * DAY * 450
    assert found.partitions == 64


@given(demands)
def test_everything_that_comes_in_a_streams_age_has_room_and_every_server_has_room_for_its_streams(
    demand: Demand,
) -> None:
    found = size(demand)
    sizes = {each.name: each for each in found.streams}
    log = sizes["LOG-p"]
    assert log.count * log.max_bytes >= demand.rate * demand.days * DAY * demand.record_bytes
    assert sizes["EVENTS"].max_bytes >= demand.rate * 7 * DAY * demand.record_bytes
    plans_and_receipts = 730 * demand.planned_share + 300 * demand.receipts_per_record
    assert sizes["RECEIPTS"].max_bytes >= demand.rate * demand.days * DAY * plans_and_receipts
    reserved = sum(each.count * each.max_bytes for each in found.streams)
    assert found.max_file_store * demand.servers >= reserved * 3
    assert found.disk_bytes >= found.max_file_store
    msgspec.json.encode(found)


@given(demands, st.floats(1, 10))
def test_more_records_never_need_less_of_anything(demand: Demand, times: float) -> None:
    less, more = size(demand), size(replace(demand, rate=demand.rate * times))
    assert more.partitions >= less.partitions
    assert more.max_file_store >= less.max_file_store * 0.99  # a busier partition shares a mark among more records
    assert more.memory_bytes >= less.memory_bytes


@given(demands)
def test_a_log_is_larger_than_comfortable_only_where_there_can_be_no_more_partitions(demand: Demand) -> None:
    found = size(demand)
    log = next(each for each in found.streams if each.name == "LOG-p")
    assert log.max_bytes <= LOG_BYTES_COMFORTABLE or found.partitions == 64


@pytest.mark.parametrize(
    ("demand", "named"),
    [
        (Demand(rate=0), "--rate"),
        (Demand(rate=float("nan")), "--rate"),
        (Demand(rate=float("inf")), "--rate"),
        (Demand(rate=1, record_bytes=0), "--record-bytes"),
        (Demand(rate=1, servers=2), "--servers"),
        (Demand(rate=1, partitions=65), "partitions"),
        (Demand(rate=1, days=7), "outlive events"),
    ],
)
def test_an_impossible_number_is_refused_by_name(demand: Demand, named: str) -> None:
    with pytest.raises(TopologyError, match=re.escape(named)):
        size(demand)


def test_written_files_differ_from_the_shipped_ones_in_sizes_and_ages_only(tmp_path: Path) -> None:
    found = size(replace(SHIPPED, rate=1000, days=60))
    write(found, tmp_path / "nats")
    shipped, written = render("production", 4), render("production", 4, folder=tmp_path / "nats")
    for old, new in zip(shipped.streams, written.streams, strict=True):
        differing = {key for key in old.config if old.config[key] != new.config[key]}
        assert differing <= {"max_bytes", "max_age"}, old.name
        assert ("max_age" in differing) == (is_log(old.name) or old.name == "RECEIPTS")
    assert [each.text for each in shipped.consumers] == [each.text for each in written.consumers]
    store = re.search(r"max_file_store: (\d+)GB", (tmp_path / "nats/server.conf").read_text())
    assert store is not None
    assert int(store[1]) << 30 == found.max_file_store


def test_roles_may_read_every_log_that_written_files_make(tmp_path: Path) -> None:
    found = size(replace(SHIPPED, rate=10_000))
    assert found.partitions == 64
    write(found, tmp_path / "nats")
    text, shipped = (folder.joinpath("accounts.conf").read_text() for folder in (tmp_path / "nats", files_folder()))
    for log in range(64):
        for method in ("DIRECT.GET", "STREAM.MSG.GET", "STREAM.INFO"):
            permission = f'"$JS.API.{method}.LOG-{{}}"'
            assert text.count(permission.format(log)) == shipped.count(permission.format(0)), log
        for method in ("MSG.NEXT", "INFO", "RESET", "UNPIN"):
            assert text.count(f'"$JS.API.CONSUMER.{method}.*.plan-{log}"') == 1, log
    assert [line for line in text.splitlines() if line not in shipped.splitlines()] == [
        line for line in text.splitlines() if re.search(r"(LOG|plan)-(1[6-9]|[2-6]\d)", line)
    ]
    assert write(found, tmp_path / "nats", folder=tmp_path / "nats") == []
