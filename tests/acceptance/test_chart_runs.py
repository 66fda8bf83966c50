"""The startup value set, started from its rendered command lines: real servers, every role, and `helm test`'s own script."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

import pytest

from ops.dev.binaries import nats_server_binary
from ops.dev.child import free_port
from ops.dev.natsserver import NatsCluster, account_users
from ops.dev.servers import Valkey
from tests.support.charts import (
    ROOT,
    Object,
    named,
    needs_helm,
    objects,
    of_kind,
    parse_command,
    pods,
)
from tests.support.commands import ENV, seamark
from tests.support.pods import PodHere, Started
from tests.support.roles import ForkedChild
from tests.support.tokens import SECRET
from tests.support.waiting import wait_for

pytestmark = [needs_helm, pytest.mark.timeout(240)]

FEW: Final = {"global": {"seamark": {"demand": {"partitions": 2}, "nats": {"publishers": ["acme"]}}}}
"""Each partition is five more groups of three copies, which a machine of two cores would make one after the other."""
FIELDS: Final = {"metadata.name": "prod-nats-0", "spec.nodeName": "node-1"}
PASSWORDS: Final = {user: f"p-{user}-0" for user in (*account_users(), "cluster", "publisher-acme")}


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> list[Object]:
    return objects(tmp_path_factory.mktemp("chart"), values=FEW)


def run(started: Started, **env: str) -> None:
    """A container that ends by itself, to its end."""
    program, *words = started.command
    assert program == "seamark"
    done = seamark(*words, **{**started.env, **env})
    assert done.returncode == 0, done.stderr


def nats_pod(rendered: list[Object], folder: Path) -> tuple[PodHere, Started]:
    """The first server's pod, whose init containers have run, and its server."""
    [servers] = of_kind(rendered, "StatefulSet")
    template = servers["spec"]["template"]
    claims = [{"name": claim["metadata"]["name"]} for claim in servers["spec"]["volumeClaimTemplates"]]
    spec = {**template["spec"], "volumes": [*template["spec"]["volumes"], *claims]}
    pod = PodHere({**template, "spec": spec}, folder, {"seamark-nats": PASSWORDS}, FIELDS)
    for each in pod.spec["initContainers"]:
        run(pod.start(each))
    return pod, pod.start(pod.spec["containers"][0])


def files_of(started: Started) -> Path:
    """The folder of the configuration that a server was told to run."""
    return Path(started.command[started.command.index("--config") + 1]).parent


def test_nats_takes_the_files_the_arguments_and_the_variables_that_its_pod_has(
    rendered: list[Object], tmp_path: Path
) -> None:
    pod, server = nats_pod(rendered, tmp_path)
    accounts = (files_of(server) / "accounts.conf").read_text()
    assert 'user: "publisher-acme", password: $SEAMARK_NATS_PUBLISHER_acme_PASSWORD' in accounts
    [store] = re.findall(r"max_file_store: (\d+)GB", (files_of(server) / "server.conf").read_text())
    assert int(store) < int(disk_of(rendered).removesuffix("Gi")), "what it may store leaves room on the disk"
    binary = str(nats_server_binary())
    env = {**os.environ, **server.env}
    said = subprocess.run([binary, "-t", *server.command], env=env, capture_output=True, text=True, timeout=20)
    assert said.returncode == 0, said.stderr
    assert "is valid" in said.stderr
    for missing in ("SEAMARK_NATS_TAGS", "SEAMARK_NATS_ROUTES", "SEAMARK_NATS_PAGER_PASSWORD"):
        less = {name: value for name, value in env.items() if name != missing}
        said = subprocess.run([binary, "-t", *server.command], env=less, capture_output=True, text=True, timeout=20)
        assert said.returncode != 0, f"without {missing}"
    mounts = {mount["mountPath"] for mount in pod.spec["containers"][0]["volumeMounts"]}
    assert {"/etc/seamark-nats", "/var/run/nats", "/data"} <= mounts, "the process id that preStop reads, and the disk"


def disk_of(rendered: list[Object]) -> str:
    [servers] = of_kind(rendered, "StatefulSet")
    return str(servers["spec"]["volumeClaimTemplates"][0]["spec"]["resources"]["requests"]["storage"])


class Release:
    """Everything of the release that runs, on this machine."""

    def __init__(self, rendered: list[Object], folder: Path, cluster: NatsCluster, redis: str, postgres: str) -> None:
        self.rendered, self.folder = rendered, folder
        passwords = cluster.servers[0]._passwords
        self.secrets: Mapping[str, Mapping[str, str]] = {
            "seamark-nats": passwords,
            "seamark-redis": {"url": redis},
            "seamark-postgres": {"url": postgres},
            "seamark-jwt": {"secret": SECRET},
            "seamark-providers": {"providers.toml": "[webhook]\n"},
        }
        self.gateway_port = free_port()
        self.places = {
            "http://prod-seamark-gateway:80": f"http://127.0.0.1:{self.gateway_port}",
            **{
                f"nats://{host(number)}:4222": f"nats://127.0.0.1:{server.port}"
                for number, server in enumerate(cluster.servers)
            },
            **{f"http://{host(number)}:8222": server.monitor_url for number, server in enumerate(cluster.servers)},
        }
        self.health: dict[str, int] = {}

    def pod(self, name: str) -> tuple[PodHere, Object]:
        """A pod by the name of its owner, and the container that stays."""
        pod = dict(pods(self.rendered))[name]
        [container] = pod["spec"]["containers"]
        return PodHere(pod, self.folder / name.replace("/", "-"), self.secrets), container

    def started(self, name: str) -> tuple[PodHere, Started]:
        """What a pod's container runs, with addresses of this machine, where pods have each a machine of their own."""
        pod, container = self.pod(name)
        started = pod.start(container)
        env = dict(started.env)
        for variable, value in env.items():
            for rendered, real in self.places.items():
                value = value.replace(rendered, real)  # noqa: PLW2901 - one after the other
            env[variable] = value
        if "SEAMARK_HEALTH_PORT" in env:
            self.health[name] = free_port()
            env |= {"SEAMARK_HEALTH_PORT": str(self.health[name]), "SEAMARK_HEALTH_HOST": "127.0.0.1"}
        if "SEAMARK_GATEWAY_PORT" in env:
            env |= {"SEAMARK_GATEWAY_PORT": str(self.gateway_port), "SEAMARK_GATEWAY_HOST": "127.0.0.1"}
        return pod, Started(started.command, env)

    def probe(self, name: str, which: str) -> bool:
        """Whether a pod's probe is content."""
        _, container = self.pod(name)
        path = container[which]["httpGet"]["path"]
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.health[name]}{path}", timeout=2) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False


def host(number: int) -> str:
    return f"prod-nats-{number}.prod-nats-headless"


@contextlib.contextmanager
def running(release: Release, names: list[str]) -> Iterator[dict[str, ForkedChild]]:
    """Processes of these pods, killed at the end."""
    children = {}
    try:
        for name in names:
            _, started = release.started(name)
            assert started.command[0] == "seamark"
            parse_command(started.command[1:])
            child = ForkedChild(name, release.folder / f"{name.replace('/', '-')}.log", death_signal=signal.SIGKILL)
            child.spawn(["ops", *started.command[1:]], env={**ENV, **started.env})
            children[name] = child
        yield children
    finally:
        for child in children.values():
            child.kill()


@pytest.fixture
def cluster(rendered: list[Object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[NatsCluster]:
    """Three servers that run the files which the init containers have written."""
    _, server = nats_pod(rendered, tmp_path / "files")
    monkeypatch.setenv("SEAMARK_NATS_FILES", str(files_of(server)))
    # Members of a cluster of the tests know the users of the shipped files only.
    monkeypatch.setenv("SEAMARK_NATS_PUBLISHER_acme_PASSWORD", PASSWORDS["publisher-acme"])
    cluster = NatsCluster(tmp_path / "cluster")
    try:
        cluster.start()
        monkeypatch.delenv("SEAMARK_NATS_FILES")
        yield cluster
    finally:
        cluster.kill()


def test_every_role_works_with_the_others_and_the_helm_test_passes(
    rendered: list[Object], cluster: NatsCluster, valkey: Valkey, empty_postgres: str, tmp_path: Path
) -> None:
    release = Release(rendered, tmp_path / "pods", cluster, valkey.url, empty_postgres)
    for kind in ("migrate", "topology"):
        [name] = [name for name, _ in pods(rendered) if name.startswith("Job/") and kind in name]
        pod, started = release.started(name)
        for each in pod.spec.get("initContainers", []):
            run(pod.start(each))
        run(started)
    deployments = [name for name, _ in pods(rendered) if name.startswith("Deployment/")]
    with running(release, deployments) as children:
        for name, child in children.items():
            wait_for(
                lambda name=name, child=child: not child.alive or release.probe(name, "readinessProbe"),
                seconds=60,
                said=lambda child=child: child.log_tail(3000),
            )
            assert child.alive, child.log_tail(3000)
            assert release.probe(name, "livenessProbe")
        scaled = objects(tmp_path, values=FEW | {"scaleByLag": {"worker": {"enabled": True}}})
        for trigger in of_kind(scaled, "ScaledObject")[0]["spec"]["triggers"]:
            told = trigger["metadata"]
            wait_for(lambda told=told: lag_as_keda_finds_it(told, cluster) == 0)
        _, test = release.started("Pod/prod-seamark-test")
        assert test.command[:2] == ["python", "-c"]
        done = subprocess.run(
            [sys.executable, *test.command[1:]],
            env={**ENV, **test.env},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=90,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert "published and received" in done.stdout
        for child in children.values():
            child.send(signal.SIGTERM)
        for name, child in children.items():
            wait_for(
                lambda child=child: not child.alive,
                seconds=grace_of(rendered, name),
                said=lambda child=child: child.log_tail(3000),
            )
            assert child.exit_code == 0, f"{name}: {child.log_tail(3000)}"


def lag_as_keda_finds_it(told: Mapping[str, str], cluster: NatsCluster) -> int:
    """What KEDA's scaler reads from the monitoring of the server that leads the consumer; -1: it finds none."""
    for server in cluster.servers:
        address = f"{server.monitor_url}/jsz?acc={told['account']}&consumers=true&config=true"
        with urllib.request.urlopen(address, timeout=10) as answer:
            for account in json.load(answer).get("account_details", []):
                for stream in account.get("stream_detail", []):
                    for consumer in stream.get("consumer_detail", []):
                        names = account["name"], stream["name"], consumer["name"]
                        led = consumer["cluster"].get("leader") == server.server_name
                        if led and names == (told["account"], told["stream"], told["consumer"]):
                            return int(consumer["num_pending"] + consumer["num_ack_pending"])
    return -1


def grace_of(rendered: list[Object], name: str) -> int:
    kind, _, own = name.partition("/")
    return int(named(rendered, kind, own)["spec"]["template"]["spec"]["terminationGracePeriodSeconds"])
