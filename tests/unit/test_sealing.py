"""Secrets as they are stored: whoever reads the database learns none, and keys can be changed."""

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.directory.sealing import PLAIN, Seal, seal_of
from engine.errors import InvalidSetting, StoreBroken
from engine.settings import Secret, Settings

OLD, NEW = bytes(range(32)), bytes(range(32, 64))
SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"


@given(st.text(min_size=1).map(lambda text: f"whsec_{text}"), st.text(), st.text())
def test_a_secret_is_opened_for_the_endpoint_it_was_sealed_for(secret: str, tenant: str, endpoint: str) -> None:
    stored = Seal([NEW]).close(secret, tenant, endpoint)
    assert Seal([NEW]).open(stored, tenant, endpoint) == secret
    with pytest.raises(StoreBroken):
        Seal([NEW]).open(stored, tenant, endpoint + "2")


def test_nothing_of_a_secret_is_seen_in_what_is_stored_and_each_time_it_is_another() -> None:
    stored = {Seal([NEW]).close(SECRET, "acme", "wh_1") for _ in range(10)}
    assert len(stored) == 10
    assert not any(SECRET[6:12] in one for one in stored)


def test_the_first_key_seals_and_all_open_until_one_is_taken_away() -> None:
    before, during, after = Seal([OLD]), Seal([NEW, OLD]), Seal([NEW])
    stored = before.close(SECRET, "acme", "wh_1")
    assert during.open(stored, "acme", "wh_1") == SECRET
    assert not during.is_newest(stored)
    again = during.close(SECRET, "acme", "wh_1")
    assert during.is_newest(again)
    assert after.open(again, "acme", "wh_1") == SECRET
    with pytest.raises(StoreBroken, match=before.name) as found:
        after.open(stored, "acme", "wh_1")
    assert "SEAMARK_STORAGE_KEYS" in found.value.remedy


def test_what_was_stored_before_there_was_a_key_is_itself() -> None:
    assert PLAIN.close(SECRET, "acme", "wh_1") == SECRET == Seal([NEW]).open(SECRET, "acme", "wh_1")
    assert (PLAIN.is_newest(SECRET), Seal([NEW]).is_newest(SECRET)) == (True, False)
    with pytest.raises(StoreBroken):
        PLAIN.open(Seal([NEW]).close(SECRET, "acme", "wh_1"), "acme", "wh_1")


@pytest.mark.parametrize("damage", ["", "!!!", "AAAA", base64.b64encode(bytes(60)).decode()])
def test_what_somebody_else_has_written_is_no_secret(damage: str) -> None:
    seal = Seal([NEW])
    with pytest.raises(StoreBroken, match="is not what the key"):
        seal.open(f"sealed:{seal.name}:{damage}", "acme", "wh_1")


def test_a_key_that_is_none_is_named_by_its_place_and_not_repeated() -> None:
    good = base64.b64encode(OLD).decode()
    assert seal_of(Settings(storage_keys=Secret(f" {good}\n"))).name == Seal([OLD]).name
    assert seal_of(Settings()).name == ""
    for bad in ("hunter2", base64.b64encode(b"short").decode()):
        with pytest.raises(InvalidSetting, match="key 2 is not 32 bytes in base64") as found:
            seal_of(Settings(storage_keys=Secret(f"{good} {bad}")))
        assert bad not in str(found.value)
