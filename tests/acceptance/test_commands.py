"""Commands without a server: one line that says what is wrong, and nothing on standard output for a program to trip over."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ops.cli.target import shown
from ops.cli.token import sign
from ops.dev.child import free_port
from ops.exitcode import MISCONFIGURED
from tests.support.commands import ENV, seamark

pytestmark = pytest.mark.timeout(240)


def test_a_broker_that_is_away_is_one_line_on_standard_error(tmp_path: Path) -> None:
    env = {"SEAMARK_NATS_URL": f"nats://127.0.0.1:{free_port()}"}
    commands = [("publish", "--to", "alice"), ("log", "alice"), ("topology", "plan")]
    with ThreadPoolExecutor() as side_by_side:  # each of them waits ten seconds for a server to come
        for done in side_by_side.map(lambda words: seamark(*words, "--json", folder=tmp_path, **env), commands):
            assert done.returncode == 1
            assert done.stdout == ""
            assert len(done.stderr.splitlines()) == 1
            assert "127.0.0.1" in done.stderr


def test_tail_says_when_it_is_not_connected_and_goes_on_trying(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("x")
    url = f"http://127.0.0.1:{free_port()}"
    with subprocess.Popen(
        [sys.executable, "-m", "ops", "tail", "alice", "--url", url, "--token-file", "token", "--json"],
        cwd=tmp_path,
        env=ENV,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as tail:
        try:
            assert tail.stderr is not None
            assert tail.stderr.readline().startswith(f"not connected to {url}, trying again")
            assert tail.stderr.readline().startswith("not connected")
        finally:
            tail.kill()


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        (("publish", "--to", "alice", "--data", "{"), "--data"),
        (("publish", "--to", "alice", "--data", "@nothing"), "--data"),
    ],
    ids=lambda part: " ".join(part) if isinstance(part, tuple) else "",
)
def test_a_mistake_is_answered_with_its_remedy(tmp_path: Path, words: tuple[str, ...], remedy: str) -> None:
    done = seamark(*words, folder=tmp_path)
    assert done.returncode == 1
    assert remedy in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        (("tail", "alice"), "make run"),
        (("token", "alice"), "make run"),
        (("topology", "check"), "make run"),
        (("topology", "render", "x", "--partitions", "0"), "Choose 1 to 64"),
        (("migrate",), "make run"),
        (("api-key", "list"), "make run"),
        (("api-key", "create", "--tenant", "acme", "--scope", "all"), "choose of events:write"),
        (("api-key", "create", "--tenant", ""), "--tenant"),
        (("tail", "alice", "--token-file", "x"), "--token-file needs --url"),
        (("tail", "alice", "--url", "http://127.0.0.1:1"), "--url needs --token-file"),
        (("tail", "alice", "--url", "http://127.0.0.1:1", "--token-file", "missing"), "missing cannot be read"),
        (("tail", "alice", "--url", "http://127.0.0.1:1", "--token-file", "/dev/null"), "is empty"),
        (("topology", "render", "x", "--profile", "prod"), "Choose one of dev, production"),
    ],
    ids=lambda part: " ".join(part) if isinstance(part, tuple) else "",
)
def test_what_is_missing_or_wrong_before_anything_was_tried_has_an_exit_code_of_its_own(
    tmp_path: Path, words: tuple[str, ...], remedy: str
) -> None:
    done = seamark(*words, folder=tmp_path)
    assert done.returncode == MISCONFIGURED
    assert remedy in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "words", ["gateway", "gateway --processes 2", "dispatcher", "projector", "planner", "dev", "log alice"]
)
def test_a_wrong_setting_starts_nothing_and_is_named(tmp_path: Path, words: str) -> None:
    done = seamark(*words.split(), folder=tmp_path, SEAMARK_HEALTH_PORT="many", SEAMARK_NATS_URL="nats://127.0.0.1:1")
    assert done.returncode == MISCONFIGURED
    assert "SEAMARK_HEALTH_PORT" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("variable", ["SEAMARK_NATS_URL", "SEAMARK_REDIS_URL", "SEAMARK_POSTGRES_URL"])
def test_the_stack_reads_a_server_from_a_file_as_roles_do(tmp_path: Path, variable: str) -> None:
    done = seamark("dev", folder=tmp_path, **{f"{variable}_FILE": "nowhere"})
    assert done.returncode == MISCONFIGURED
    assert f"{variable}_FILE" in done.stderr
    assert not (tmp_path / ".seamark/nats").exists()


def test_help_names_every_command(tmp_path: Path) -> None:
    done = seamark("--help", folder=tmp_path)
    assert done.returncode == 0
    for name in ("dev", "gateway", "dispatcher", "topology", "publish", "tail", "token", "log"):
        assert name in done.stdout


@pytest.mark.parametrize(
    ("words", "says"),
    [(("bob",), "a token of 'alice'"), (("alice", "--tenant", "other"), "a token of tenant 'default'")],
)
def test_tail_does_not_show_one_users_log_as_that_of_another(tmp_path: Path, words: tuple[str, ...], says: str) -> None:
    (tmp_path / "token").write_text(sign("a secret for tests that is long enough for HS256", "default", "alice", 60))
    done = seamark("tail", *words, "--url", "http://127.0.0.1:1", "--token-file", "token", folder=tmp_path)
    assert done.returncode == MISCONFIGURED
    assert says in done.stderr


@pytest.mark.parametrize(
    "words",
    [
        "dev --port 0",
        "dev --port 70000",
        "dev --partitions 65",
        "tail alice --count -1",
        "log alice --limit -1",
        "token alice --seconds 0",
        "funnel --hours 1e300",
        "api-key create --tenant t --days 0",
        "api-key revoke 99999999999999999999",
    ],
)
def test_a_value_out_of_range_is_refused_before_anything_starts(tmp_path: Path, words: str) -> None:
    done = seamark(*words.split(), folder=tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_database_that_was_not_named_is_not_taken_from_another_stack(tmp_path: Path) -> None:
    done = seamark("migrate", folder=tmp_path, SEAMARK_NATS_URL="nats://127.0.0.1:1")
    assert done.returncode == MISCONFIGURED
    assert "SEAMARK_POSTGRES_URL is not set" in done.stderr


@pytest.mark.parametrize("words", ["migrate", "api-key list"])
@pytest.mark.parametrize(
    ("url", "code", "says"),
    [
        ("postgresql://seamark:hidden/word@db/seamark", MISCONFIGURED, "%XX"),
        ("mysql://seamark:hidden@db/seamark", MISCONFIGURED, "must begin with postgresql:"),
        ("postgresql://seamark:hidden@127.0.0.1:1/seamark", 1, "PostgreSQL"),
    ],
)
def test_a_database_that_cannot_be_reached_is_one_line_without_its_password(
    tmp_path: Path, words: str, url: str, code: int, says: str
) -> None:
    done = seamark(*words.split(), folder=tmp_path, SEAMARK_POSTGRES_URL=url)
    assert done.returncode == code
    assert says in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert "hidden" not in done.stderr


@pytest.mark.parametrize(
    ("urls", "expected"),
    [
        ("nats://127.0.0.1:4222", "nats://127.0.0.1:4222"),
        ("nats://user:hidden@n1:4222,nats://user:hid@den@n2", "nats://n1:4222,nats://n2"),
        ("redis://:hid,den@r:6379/0", "redis://r:6379/0"),
        ("redis://r:6379/0?password=hidden", "redis://r:6379/0"),
        ("postgresql://u:hidden?x@db:5432,other/seamark?sslmode=require", "postgresql://db:5432,other/seamark"),
        ("user:hidden@n1:4222", "n1:4222"),
        ("postgresql://db/seamark?user=u&password=hid@den", "postgresql://db/seamark"),
    ],
)
def test_addresses_are_shown_without_what_lets_in(urls: str, expected: str) -> None:
    assert shown(urls) == expected
