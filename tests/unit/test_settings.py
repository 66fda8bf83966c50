"""Settings: where they come from, what wins, and what is said when one is wrong."""

import re
from dataclasses import fields
from pathlib import Path

import pytest

from engine import settings
from engine.errors import InvalidSetting
from engine.settings import Secret, Settings, given_settings, load_settings
from seamark.protocol.logins import inbox_prefix_of, login_of


def test_without_anything_set_the_defaults_are_in_force() -> None:
    found = load_settings({})
    assert found.nats_url.reveal() == "nats://127.0.0.1:4222"
    assert found.profile == "production"


def test_the_environment_wins_over_the_file_and_the_file_over_the_default(tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text('gateway_port = 9000\nprofile = "dev"\n')
    found = load_settings({"SEAMARK_SETTINGS": str(file), "SEAMARK_GATEWAY_PORT": "9001"})
    assert (found.gateway_port, found.profile) == (9001, "dev")


def test_a_secret_can_be_a_file_and_shows_itself_only_when_asked(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_text("hidden value\n")
    found = load_settings({"SEAMARK_JWT_SECRET_FILE": str(file)})
    assert found.jwt_secret is not None
    assert found.jwt_secret.reveal() == "hidden value"
    assert "hidden value" not in repr(found)
    assert "hidden value" not in str(found.jwt_secret)
    assert "hidden value" not in f"{found.jwt_secret!r:>40}"


def test_lists_are_separated_by_commas_in_the_environment_and_arrays_in_the_file(tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text('origins = ["https://a.example", "https://b.example"]\n')
    expected = ("https://a.example", "https://b.example")
    assert load_settings({}, file).origins == expected
    assert load_settings({"SEAMARK_ORIGINS": "https://a.example, https://b.example,"}).origins == expected


def test_an_empty_variable_is_not_set(tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text('jwt_issuer = ""\nhealth_port = 9001\norigins = ""\n')
    empty = {f"SEAMARK_{entry.name.upper()}": "" for entry in fields(Settings)}
    files = {f"{variable}_FILE": "" for variable in empty}
    found = load_settings(empty | files | {"SEAMARK_SETTINGS": str(file)})
    assert (found.postgres_url, found.jwt_issuer, found.origins, found.health_port) == (None, None, (), 9001)
    assert found.redis_url.reveal() == "redis://127.0.0.1:6379/0"
    assert given_settings(empty | files) == set()
    secret = tmp_path / "secret"
    secret.write_text("hidden")
    assert load_settings(empty | {"SEAMARK_JWT_SECRET_FILE": str(secret)}).jwt_secret is not None


def test_what_is_given_is_told_from_what_is_a_default_however_it_was_given(tmp_path: Path) -> None:
    file, url = tmp_path / "settings.toml", tmp_path / "url"
    file.write_text("partitions = 4\n")
    url.write_text("nats://127.0.0.1:4222\n")  # what the default says
    env = {"SEAMARK_NATS_URL_FILE": str(url), "SEAMARK_PROFILE": "dev", "SEAMARK_POSTGRES_URL": ""}
    assert given_settings(env, file) == {"nats_url", "profile", "partitions"}
    assert given_settings({}) == set()


@pytest.mark.parametrize(
    ("env", "named"),
    [
        ({"SEAMARK_GATEWAY_PORT": "many"}, "SEAMARK_GATEWAY_PORT"),
        ({"SEAMARK_PROFILE": "prod"}, "dev, production"),
        ({"SEAMARK_LOG_FORMAT": "xml"}, "SEAMARK_LOG_FORMAT"),
        ({"SEAMARK_JWT_SECRET_FILE": "/nowhere"}, "SEAMARK_JWT_SECRET_FILE"),
        ({"SEAMARK_JWT_SECRET_FILE": "/nowhere", "SEAMARK_JWT_SECRET": "x"}, "unset one"),
        ({"SEAMARK_SETTINGS": "/nowhere"}, "SEAMARK_SETTINGS"),
        ({"SEAMARK_JWT_SECRET_FILE": "/dev/null"}, "SEAMARK_JWT_SECRET_FILE: /dev/null is empty"),
        ({"SEAMARK_REDIS_URL": "localhost:6379"}, "SEAMARK_REDIS_URL must begin with redis://"),
        ({"SEAMARK_POSTGRES_URL": "postgresql+asyncpg://p"}, "SEAMARK_POSTGRES_URL must begin with postgresql://"),
        ({"SEAMARK_GATEWAY_PORT": "70000"}, "SEAMARK_GATEWAY_PORT must be 0 to 65535"),
        ({"SEAMARK_HEALTH_PORT": "99999"}, "SEAMARK_HEALTH_PORT must be 0 to 65535"),
        ({"SEAMARK_HEALTH_PORT": "-1"}, "SEAMARK_HEALTH_PORT must be 0 to 65535"),
        ({"SEAMARK_PARTITIONS": "0"}, "SEAMARK_PARTITIONS must be 1 to 64"),
        ({"SEAMARK_HANDSHAKES_PER_MINUTE": "-1"}, "SEAMARK_HANDSHAKES_PER_MINUTE"),
    ],
)
def test_a_wrong_setting_is_named_with_the_remedy(env: dict[str, str], named: str) -> None:
    with pytest.raises(InvalidSetting, match=named):
        load_settings(env)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("gateway_port = ", "not TOML"),
        ("gateway_prot = 1", "gateway_prot"),
        ("nats_url = 4222", "SEAMARK_NATS_URL"),
        ("gateway_port = true", "SEAMARK_GATEWAY_PORT"),
        ("gateway_port = 80.5", "SEAMARK_GATEWAY_PORT"),
        ("origins = 5", "SEAMARK_ORIGINS"),
        ("origins = [5]", "SEAMARK_ORIGINS"),
    ],
)
def test_a_wrong_line_in_the_file_is_named(tmp_path: Path, text: str, named: str) -> None:
    file = tmp_path / "settings.toml"
    file.write_text(text)
    with pytest.raises(InvalidSetting, match=named):
        load_settings({}, file)


def test_a_value_that_is_refused_is_not_repeated_when_it_may_be_a_secret(tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text("jwt_secret = 123456789\n")
    with pytest.raises(InvalidSetting) as refused:
        load_settings({}, file)
    assert "123456789" not in str(refused.value)


def test_every_setting_says_what_it_is() -> None:
    source = Path(settings.__file__).read_text()
    for entry in fields(Settings):
        declared = source.index(f"    {entry.name}: ")
        assert source[declared:].splitlines()[1].lstrip().startswith('"""'), entry.name


def test_what_may_hold_a_password_is_a_secret() -> None:
    given = {"redis_url": "redis://r", "postgres_url": "postgresql://p"}
    for name in ("nats_url", "nats_password", "redis_url", "postgres_url", "jwt_secret", "dev_api_key"):
        env = {f"SEAMARK_{name.upper()}": given.get(name, "x")}
        assert isinstance(getattr(load_settings(env), name), Secret), name


def test_no_setting_that_holds_a_password_shows_it() -> None:
    found = load_settings({"SEAMARK_NATS_URL": "nats://dispatcher:hidden@n1", "SEAMARK_REDIS_URL": "redis://:hidden@r"})
    assert "hidden" not in repr(found)


@pytest.mark.parametrize(
    ("env", "prefix"),
    [
        ({}, "_INBOX"),
        ({"SEAMARK_NATS_USER": "dispatcher"}, "_INBOX_dispatcher"),
        ({"SEAMARK_NATS_URL": "nats://dispatcher:pw@n1"}, "_INBOX_dispatcher"),
        ({"SEAMARK_NATS_URL": "nats://n1:4222,nats://dispatcher:pw@n2:4222"}, "_INBOX_dispatcher"),
        ({"SEAMARK_NATS_URL": "dispatcher:pw@n1:4222"}, "_INBOX_dispatcher"),
        ({"SEAMARK_NATS_URL": "nats://gateway:pw@n1", "SEAMARK_NATS_USER": "dispatcher"}, "_INBOX_dispatcher"),
        ({"SEAMARK_NATS_URL": "nats://dispatcher:pw@n1", "SEAMARK_NATS_INBOX_PREFIX": "_MINE"}, "_MINE"),
        # A token, as nats-py takes it: it names nobody, and must not be seen in a subject.
        ({"SEAMARK_NATS_URL": "nats://s3cr3t@n1"}, "_INBOX"),
    ],
)
def test_replies_are_read_where_the_accounts_let_the_user_read(env: dict[str, str], prefix: str) -> None:
    assert load_settings(env).nats("seamark-test").inbox_prefix == prefix


def test_an_address_that_is_none_names_nobody() -> None:
    assert inbox_prefix_of("nats://[") == "_INBOX"


def test_who_an_address_names_is_told_to_servers_that_are_found_later_too() -> None:
    assert login_of("nats://n1,nats://me:pw@n2", None, None, None) == {"user": "me", "password": "pw"}
    assert login_of("nats://other:pw@n1", "me", "mine", None) == {"user": "me", "password": "mine"}
    assert login_of("nats://token@n1", None, None, "file.creds") == {"user_credentials": "file.creds"}


@pytest.mark.parametrize("name", ["POSTGRES", "REDIS"])
def test_a_password_that_breaks_its_address_is_refused_and_not_repeated(name: str) -> None:
    scheme = {"POSTGRES": "postgresql", "REDIS": "redis"}[name]
    with pytest.raises(InvalidSetting, match=r"_URL is not an address.*%2F") as refused:
        load_settings({f"SEAMARK_{name}_URL": f"{scheme}://user:se/cret@host/db"})
    assert "se/" not in str(refused.value)
    for address in ("host", "host:1", "user:se%2Fcret@host:1/db", "[::1]:1/db", "user@[::1]", "/db?host=/run"):
        assert load_settings({f"SEAMARK_{name}_URL": f"{scheme}://{address}"})
    assert load_settings({"SEAMARK_POSTGRES_URL": "postgresql://u:p@h1:5432,h2:5433/db"})


def test_the_manual_has_every_setting() -> None:
    manual = (Path(settings.__file__).parents[1] / "docs/operations.md").read_text()
    table = manual[manual.index("## Settings") : manual.index("## Exit codes")]
    named = set(re.findall(r"`(?:SEAMARK)?_([A-Z_]+)`", table))
    assert {entry.name.upper() for entry in fields(Settings)} <= named
