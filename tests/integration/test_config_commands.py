"""`seamark config`, as an operator types it: files and database come to say the same, whole or not at all."""

import json
from pathlib import Path
from typing import Any

import pytest

from engine.directory.changes import changing
from engine.directory.configuration import Configuration, apply_configuration, read_configuration
from engine.directory.rules import read_rules
from engine.directory.templates import TemplateKey
from engine.directory.types import put_type
from engine.plan.preferences import TenantDefaults
from engine.plan.rules import ChannelRule, TypeRule
from engine.postgres import Pool
from ops.dev.servers import NatsServer
from ops.exitcode import MISCONFIGURED
from tests.support import commands

FILES = {
    "tenant.toml": 'timezone = "Europe/Vienna"\n',
    "types/order.*.toml": "[channels.push]\nunless_seen_seconds = 60\n",
    "templates/order.*/push.default/body.txt": "Order {{ data.order }}\n",
}


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def config(postgres: str, nats_server: NatsServer) -> Any:
    def run(*words: object, code: int = 0) -> list[dict[str, Any]]:
        settings = {"SEAMARK_POSTGRES_URL": postgres, "SEAMARK_NATS_URL": nats_server.url}
        done = commands.seamark("config", *map(str, words), "--json", "--tenant", "acme", **settings)
        assert done.returncode == code, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    return run


async def test_files_become_the_configuration_and_come_back_as_they_were(
    config: Any, pool: Pool, tmp_path: Path
) -> None:
    files = write(tmp_path / "files", FILES)
    would = config("diff", files, code=2)
    assert [(one["kind"], one["name"], one["action"]) for one in would] == [
        ("type", "order.*", "add"),
        ("template", "order.*/push/default", "add"),
        ("defaults", "tenant", "add"),
    ]
    assert (await read_rules(pool, "acme")).version == 0, "diff changes nothing"
    assert config("apply", files) == would
    rules = await read_rules(pool, "acme")
    assert rules.types["order.*"].channels == {"push": ChannelRule(unless_seen_seconds=60)}
    assert (rules.templates_of("order.x"), rules.defaults.timezone) == (("push",), "Europe/Vienna")
    assert config("apply", files) == config("diff", files) == []
    assert (await read_rules(pool, "acme")).version == rules.version
    [written] = config("export", tmp_path / "exported")
    assert {
        str(Path(one).relative_to(tmp_path / "exported")): Path(one).read_text() for one in written["written"]
    } == FILES
    assert config("diff", tmp_path / "exported", "--prune") == []


async def test_what_is_not_in_the_files_stays_until_it_is_to_be_deleted(
    config: Any, pool: Pool, tmp_path: Path
) -> None:
    files = write(tmp_path, FILES)
    config("apply", files)
    async with changing(pool, "acme") as change:
        await put_type(change, TypeRule(pattern="by.hand"))
    kept = {"kind": "type", "name": "by.hand", "action": "keep"}
    assert config("diff", files) == config("apply", files) == [kept]
    deleted = {**kept, "action": "delete"}
    assert config("diff", files, "--prune", code=2) == config("apply", files, "--prune") == [deleted]
    assert set((await read_rules(pool, "acme")).types) == {"order.*"}


async def test_an_empty_file_is_a_document_too(config: Any, tmp_path: Path) -> None:
    files = write(tmp_path, {"tenant.toml": ""})
    assert [one["action"] for one in config("apply", files)] == ["add"]
    assert config("diff", files) == []


async def test_a_fault_in_one_file_changes_nothing(config: Any, pool: Pool, tmp_path: Path) -> None:
    files = write(tmp_path, {**FILES, "types/z.toml": "ttl_seconds = 0\n"})
    for command in ("diff", "apply"):
        [fault] = config(command, files, code=MISCONFIGURED)
        assert fault["fault"].startswith("types/z.toml: ")
    assert (await read_rules(pool, "acme")).version == 0


def test_a_broker_that_is_away_hinders_nothing_and_people_see_what_was_done(postgres: str, tmp_path: Path) -> None:
    files = write(tmp_path, FILES)
    settings = {"SEAMARK_POSTGRES_URL": postgres, "SEAMARK_NATS_URL": "nats://127.0.0.1:1"}
    done = commands.seamark("config", "apply", str(files), **settings)
    assert (done.returncode, done.stdout.splitlines()[0]) == (0, "+ type order.*")
    assert "within half a minute" in done.stderr
    (files / "types/order.*.toml").write_text("ttl_seconds = 60\n")
    done = commands.seamark("config", "diff", str(files), **settings)
    assert (done.returncode, done.stdout) == (2, "~ type order.*: channels, ttl_seconds\n")


async def test_all_is_applied_or_nothing(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than a page of each, and a fault of the database in the midst of it."""
    monkeypatch.setattr("engine.directory.configuration.PAGE_ROWS", 2)
    wanted = Configuration(
        types={f"t{number}": TypeRule(pattern=f"t{number}") for number in range(5)},
        templates={TemplateKey(f"t{number}", "sms", "de"): {"body": "x"} for number in range(5)},
        defaults=TenantDefaults(timezone="Europe/Vienna"),
    )
    done = []

    def fail_at_the_last(number: int, total: int) -> None:
        done.append(number)
        if number == total:
            raise ConnectionResetError

    async def apply(progress: Any = None) -> None:
        async with changing(pool, "acme") as change:
            await apply_configuration(change, wanted, prune=True, progress=progress)

    with pytest.raises(Exception, match="ConnectionReset"):
        await apply(fail_at_the_last)
    assert len(done) == 11
    async with pool.acquire() as connection:
        assert await read_configuration(connection, "acme") == Configuration()
        await apply()
        assert await read_configuration(connection, "acme") == wanted
