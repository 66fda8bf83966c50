"""Dockerfile and compose.yaml, as far as they need no container engine: what they run is run, what they name is there."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
import yaml
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from engine.broker.jetstream import NatsSettings, connect
from engine.settings import Settings, given_settings, load_settings, variable_of
from engine.topology import server as topology
from engine.worker.providers import SENT_BY_WORKERS
from ops.dev.binaries import nats_server_binary, valkey_binary
from ops.dev.child import free_port
from ops.dev.natsserver import account_users
from ops.dev.servers import NatsServer, Valkey
from ops.dev.stores import POSTGRES_SETTINGS, VALKEY_SETTINGS
from ops.process import CLEAN_UP_SECONDS_MAX
from tests.support.charts import parse_command, stop_seconds_max
from tests.support.commands import seamark
from tests.support.dockerfile import Build, Stage, stages
from tests.support.forks import ROOT
from tests.support.pushing import apple_key
from tests.support.waiting import wait_for

pytestmark = pytest.mark.timeout(300)

ROLES: Final = ("dispatcher", "gateway", "pager", "planner", "projector", "worker")
STRANGER: Final = 65532
"""The user of the image: it owns nothing in it."""


@pytest.fixture(scope="module")
def image() -> tuple[Stage, Stage]:
    build, final = stages(ROOT / "Dockerfile")
    return build, final


@pytest.fixture(scope="module")
def built(image: tuple[Stage, Stage]) -> Iterator[Build]:
    """The first stage, carried out once."""
    folder = Path(tempfile.mkdtemp(prefix="seamark-image-"))
    try:
        yield Build(image[0], ROOT, folder)
    finally:
        shutil.rmtree(folder)


def without_rights(*words: str, folder: Path, env: dict[str, str]) -> subprocess.Popen[str]:
    """A program of the image with no capability, and no way to any, as Kubernetes and compose run it.

    Not as another user: Python itself may lie where only this one may enter.
    """
    drop = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs"] if os.geteuid() == 0 else []
    return subprocess.Popen(
        [*drop, *words], cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def variables(built: Build, final: Stage, **more: str) -> dict[str, str]:
    """What a container of the image finds in its environment."""
    return {**final.env(), "PATH": built.here(final.env()["PATH"]), **more}


def test_what_is_copied_is_all_that_the_last_stage_takes(image: tuple[Stage, Stage]) -> None:
    build, final = image
    assert build.base == final.base == "${PYTHON}", (
        "a virtual environment runs on the interpreter that it was made with"
    )
    assert final.all("COPY") == ["--from=build /opt/seamark /opt/seamark"]
    assert final.all("USER") == [f"{STRANGER}:{STRANGER}"]
    words = [word for word, _ in final.instructions]
    assert words.index("USER") > words.index("RUN"), "what needs root comes first"
    assert final.all("EXPOSE") == [f"{Settings().gateway_port} {final.env()['SEAMARK_HEALTH_PORT']}"]


def test_every_program_is_there_and_nothing_that_installs_or_compiles(image: tuple[Stage, Stage], built: Build) -> None:
    [program] = image[1].array("ENTRYPOINT")
    env = variables(built, image[1])
    path = shutil.which(program, path=env["PATH"].split(":")[0])
    assert path is not None
    done = subprocess.run([path, "--help"], env=env, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    for role in (*ROLES, "migrate", "topology"):
        assert role in done.stdout
    python = built.here("/opt/seamark/bin/python")
    found = subprocess.run([python, "-m", "pip"], capture_output=True, text=True, timeout=30)
    assert "No module named pip" in found.stderr
    assert list(built.root.glob("opt/seamark/lib/*/site-packages/ops/__pycache__/*.pyc")), (
        "compiled, for a disk that is read only"
    )


def test_the_image_has_what_every_channel_and_both_exporters_of_spans_need(
    image: tuple[Stage, Stage], built: Build, tmp_path: Path
) -> None:
    example, *_ = re.findall(r"```toml\n(.*?)```", (ROOT / "docs/worker.md").read_text(), re.DOTALL)
    (tmp_path / "providers.toml").write_text(example)
    pem = apple_key().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
    secrets = {"AuthKey_ABC1234567.p8": pem, "smtp.password": "s", "twilio.secret": "t", "sns.secret": "a"}
    for name, secret in secrets.items():
        (tmp_path / name).write_text(secret)
    env = variables(built, image[1], SEAMARK_PROVIDERS=str(tmp_path / "providers.toml"))
    exporters = ("grpc", "http")
    imports = "; ".join(f"import opentelemetry.exporter.otlp.proto.{name}.trace_exporter" for name in exporters)
    check, imported = (
        subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
        for words in (
            [built.here("/opt/seamark/bin/seamark"), "worker", "--check"],
            [built.here("/opt/seamark/bin/python"), "-c", f"import engine.traces.export; {imports}"],
        )
    )
    assert check.returncode == 0, check.stderr
    assert [line.split(":")[0] for line in check.stdout.splitlines()] == list(SENT_BY_WORKERS)
    assert imported.returncode == 0, imported.stderr


def test_files_for_nats_are_written_where_kubernetes_lends_a_folder(image: tuple[Stage, Stage], built: Build) -> None:
    """An emptyDir belongs to somebody else and is open: its own rights cannot be changed from inside."""
    lent = built.root / "lent"
    lent.mkdir()
    lent.chmod(0o2777)
    if os.geteuid() == 0:
        os.chown(lent, STRANGER, STRANGER)
    words = ("topology", "size", "--rate=20", "--partitions=32", "--servers=3", f"--write={lent}/files")
    program = built.here("/opt/seamark/bin/seamark")
    process = without_rights(program, *words, folder=lent, env=variables(built, image[1]))
    said, _ = process.communicate(timeout=30)
    assert process.returncode == 0, said
    assert '"$JS.API.STREAM.INFO.LOG-31"' in (lent / "files/accounts.conf").read_text()
    names = sorted(path.name for path in (lent / "files/streams").iterdir())
    assert names == sorted(path.name for path in (ROOT / "nats/streams").iterdir())


async def test_a_role_of_the_image_runs_without_any_right_and_its_health_is_seen(
    image: tuple[Stage, Stage], built: Build, nats_server: NatsServer, valkey: Valkey
) -> None:
    broker = await connect(NatsSettings(nats_server.url))
    await topology.ensure(broker, "dev", None)
    await broker.close()
    port = str(free_port())
    env = variables(built, image[1], SEAMARK_HEALTH_PORT=port, SEAMARK_PROFILE="dev")
    env |= {"SEAMARK_NATS_URL": nats_server.url, "SEAMARK_REDIS_URL": valkey.url}
    check = image[1].array("HEALTHCHECK")

    def healthy() -> bool:
        words = [built.here("/opt/seamark/bin/python"), *check[1:]]
        assert check[0] == "python"
        return subprocess.run(words, env=env, capture_output=True, timeout=20).returncode == 0

    process = without_rights(built.here("/opt/seamark/bin/seamark"), "dispatcher", folder=built.root, env=env)
    try:
        wait_for(lambda: process.poll() is not None or healthy(), every_seconds=0.2)
        assert process.poll() is None, process.stdout and process.stdout.read()
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=30)
        assert process.returncode == 0, said
        assert not healthy()
    finally:
        process.kill()
        process.wait()


# --- compose.yaml -----------------------------------------------------------------------------------------------------

Service = dict[str, Any]


def test_the_documented_commands_write_every_variable_that_compose_asks_for(tmp_path: Path) -> None:
    document = (ROOT / "docs/deployment.md").read_text()
    [commands] = re.findall(r"(?ms)^for user in .*?(?=^docker compose up)", document)
    done = subprocess.run(["bash", "-euc", commands], cwd=tmp_path, capture_output=True, text=True, timeout=20)
    assert done.returncode == 0, done.stderr
    written = dict(line.split("=", 1) for line in (tmp_path / ".env").read_text().splitlines())
    assert written.keys() == DOT_ENV.keys()
    assert all(written.values())
    assert all(value[0] == "p" for name, value in written.items() if name.startswith("SEAMARK_NATS_"))


PASSWORDS: Final = {f"SEAMARK_NATS_{user.upper()}_PASSWORD": f"p-{user}" for user in (*account_users(), "cluster")}
DOT_ENV: Final = PASSWORDS | {
    "POSTGRES_PASSWORD": "p-postgres",
    "SEAMARK_JWT_SECRET": "a secret that is long enough for HS256",
    "SEAMARK_UNSUBSCRIBE_SECRETS": "a-secret-of-32-characters-or-more",
}


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    text = (ROOT / "compose.yaml").read_text()
    asked = set(re.findall(r"\$\{(\w+):\?\}", text))
    assert asked == DOT_ENV.keys(), "each is asked for, and none is made up"
    assert text.count("${") == len(re.findall(r"\$\{\w+:\?\}", text)), "a variable that is not set is an error"
    found: dict[str, Any] = yaml.safe_load(re.sub(r"\$\{(\w+):\?\}", lambda name: DOT_ENV[name[1]], text))
    return found


def ours(compose: dict[str, Any]) -> dict[str, Service]:
    return {name: each for name, each in compose["services"].items() if each["image"] == "seamark"}


def test_every_service_of_ours_is_a_command_with_settings_that_it_reads(compose: dict[str, Any]) -> None:
    settings = {variable_of(name) for name in Settings.__dataclass_fields__}
    assert {"migrate", "topology", *ROLES} == ours(compose).keys()
    for name, each in ours(compose).items():
        parse_command(each["command"])
        assert each["command"][0] == name
        assert each["environment"].keys() <= settings, name
        assert load_settings(each["environment"]).profile == "production"
        assert each["read_only"] is True
        assert each["cap_drop"] == ["ALL"]
        if name in ROLES:
            assert int(each["stop_grace_period"].removesuffix("s")) > stop_seconds_max(name) + CLEAN_UP_SECONDS_MAX
            assert given_settings(each["environment"]) >= {"nats_url", "nats_user", "nats_password"}
            assert each["environment"]["SEAMARK_NATS_PASSWORD"] == f"p-{name}"


def test_the_worker_of_compose_takes_the_providers_that_are_shipped(compose: dict[str, Any]) -> None:
    each = compose["services"]["worker"]
    [(source, target)] = [volume.removesuffix(":ro").split(":") for volume in each["volumes"]]
    env = {**each["environment"]}
    env["SEAMARK_PROVIDERS"] = env["SEAMARK_PROVIDERS"].replace(target, str(ROOT / source))
    done = seamark(*each["command"], "--check", **env)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "webhook: webhook\n"
    for name, service in ours(compose).items():
        assert name == "worker" or "SEAMARK_PROVIDERS" not in service["environment"], "nobody else sees its secrets"


def test_every_name_and_address_is_that_of_a_service(compose: dict[str, Any]) -> None:
    services = compose["services"]
    ports = {
        "n1": {4222, 6222, 8222},
        "n2": {4222, 6222, 8222},
        "n3": {4222, 6222, 8222},
        "valkey": {6379},
        "postgres": {5432},
    }
    for name, each in services.items():
        assert each.get("depends_on", {}).keys() <= services.keys(), name
        for other, condition in each.get("depends_on", {}).items():
            if condition["condition"] == "service_healthy":
                assert "healthcheck" in services[other]
        for value in each.get("environment", {}).values():
            for host, port in re.findall(r"(?:://|@)([a-z][a-z0-9]*)(?::(\d+))?(?=[/,\"]|$)", str(value)):
                assert host in ports, f"{name}: {value}"
                assert not port or int(port) in ports[host], f"{name}: {value}"
        for volume in each.get("volumes", []):
            source = volume.split(":")[0]
            assert (ROOT / source).is_dir() if source.startswith(".") else source in compose["volumes"]


@pytest.mark.parametrize("name", ["n1", "n2", "n3"])
def test_each_nats_server_takes_its_files_and_variables(compose: dict[str, Any], name: str) -> None:
    each = compose["services"][name]
    words = [word.replace("/etc/nats/", f"{ROOT}/nats/") for word in each["command"]]
    env = {**os.environ, **each["environment"]}
    done = subprocess.run([nats_server_binary(), "-t", *words], env=env, capture_output=True, text=True, timeout=20)
    assert done.returncode == 0, done.stderr
    assert each["environment"]["SEAMARK_NATS_NAME"] == name
    assert f"./nats:{Path(each['command'][1]).parent}:ro" in each["volumes"]
    assert f"{name}:{each['environment']['SEAMARK_NATS_STORE']}" in each["volumes"]


def test_the_stores_keep_what_seamark_needs_them_to_keep(compose: dict[str, Any], tmp_path: Path) -> None:
    program, *words = compose["services"]["valkey"]["command"]
    assert program == "valkey-server"
    assert dict(zip(words[::2], words[1::2], strict=True)) == {
        f"--{name}": value for name, value in VALKEY_SETTINGS.items()
    }
    port = free_port()
    process = subprocess.Popen(
        [valkey_binary(), *words, "--port", str(port), "--dir", tmp_path], stdout=subprocess.DEVNULL
    )
    try:
        wait_for(lambda: (tmp_path / "appendonlydir").exists() or process.poll() is not None)
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()
    assert f"max_connections={POSTGRES_SETTINGS['max_connections']}" in compose["services"]["postgres"]["command"]
