"""What is compared goes through the disk: nothing is lost there, and of each user it comes back in order."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from projections.verify import spill as module
from projections.verify.spill import Spill

items = st.lists(
    st.tuples(st.sampled_from(["a.x", "a.y", "b.=C3=A4"]), st.booleans(), st.binary(max_size=40)), max_size=60
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(items=items, parts=st.integers(1, 5))
def test_what_was_added_comes_back_by_user_in_its_order_and_once(
    tmp_path_factory: pytest.TempPathFactory, items: Sequence[tuple[str, bool, bytes]], parts: int
) -> None:
    spill = Spill(tmp_path_factory.mktemp("spill"), (parts - 1) * module.ITEMS_PER_PART)
    expected: dict[str, tuple[list[bytes], list[bytes]]] = {}
    for user, stored, item in items:
        (spill.stored if stored else spill.said)(user, item)
        expected.setdefault(user, ([], []))[stored].append(item)
    spill.flush()
    found = {}
    for number in range(spill.parts):
        part = spill.take(number)
        assert not part.keys() & found.keys(), "a user in two parts"
        found |= part
    assert found == expected
    assert all(not spill.take(number) for number in range(spill.parts))


def test_no_more_waits_in_memory_than_the_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BUFFERED_BYTES", 10_000)
    spill = Spill(tmp_path, 10 * module.ITEMS_PER_PART)
    for number in range(1000):
        spill.said(f"a.{number}", b"x" * 100)
        assert sum(map(len, spill._buffers)) <= 10_000 + 200
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) > 90_000
