"""The chart as an operator renders it, and what Kubernetes and `seamark` say of the result."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import pytest
import typer
import yaml

from ops import process
from ops.cli import app, worker

ROOT: Final = Path(__file__).parents[2]
CHART: Final = ROOT / "deploy/helm/seamark"
SETS: Final = tuple(sorted(path.stem for path in (CHART / "sets").glob("*.yaml")))
STAND_IN: Final = ROOT / "tests/fixtures/charts/nats"
"""Takes the place of NATS' own chart where `helm dependency build` has not fetched it."""
OWN_SCHEMAS: Final = ROOT / "tests/fixtures/crds"

TOOLS: Final = Path(os.environ.get("SEAMARK_TOOLS") or ROOT / ".tools")
"""What `make tools` brings."""

RELEASE: Final = "prod"
KUBERNETES: Final = "1.37.0"

Object = dict[str, Any]
COLLECTOR: Final = {
    "endpoint": "grpc://otel.monitoring.svc:4317",
    "headersSecret": {"name": "otel", "key": "headers"},
    "url": "https://traces.example.com/{trace_id}",
}
"""`traces:` in values."""


NAME: Final = "prod-seamark"
ROLES: Final = ("dispatcher", "gateway", "pager", "planner", "projector", "worker")
BY_JOBS: Final = {"scaleByLag": {"worker": {"enabled": True}}}


def tool(name: str) -> str | None:
    """The path of `helm` or `kubeconform`: of `make tools`, else on the PATH."""
    return shutil.which(name, path=str(TOOLS / "bin")) or shutil.which(name)


def kubernetes_schemas() -> Path | None:
    """The schemas of Kubernetes' own kinds, where `make tools` has brought them."""
    folder = TOOLS / f"wheels/kubernetes_validate/kubernetes-json-schema/v{KUBERNETES}-local-strict"
    return folder if folder.is_dir() else None


needs_helm: Final = pytest.mark.skipif(tool("helm") is None, reason="no helm: `make tools` brings it")
needs_kubeconform: Final = pytest.mark.skipif(
    tool("kubeconform") is None or kubernetes_schemas() is None,
    reason="no kubeconform or no schemas: `make tools` brings both",
)


def helm(*words: str) -> subprocess.CompletedProcess[str]:
    """Run helm with a cluster nowhere."""
    program = tool("helm")
    assert program is not None
    nowhere = {"KUBECONFIG": os.devnull, "HELM_NO_PLUGINS": "1"}
    return subprocess.run([program, *words], env={**os.environ, **nowhere}, capture_output=True, text=True, timeout=60)


@functools.cache
def whole_chart(folder: Path) -> Path:
    """A copy of the chart with the chart of NATS in it."""
    copy = folder / "seamark"
    shutil.copytree(CHART, copy)
    fetched = list((CHART / "charts").glob("nats*"))
    if not fetched:
        shutil.copytree(STAND_IN, copy / "charts/nats")
    return copy


def words_of(chart: Path, name: str, values: Mapping[str, Any], folder: Path) -> list[str]:
    """The arguments that name chart and values: a set, and what is said besides."""
    words = [str(chart), "--values", str(chart / f"sets/{name}.yaml")]
    if values:
        path = folder / "more.yaml"
        path.write_text(json.dumps(values))
        words += ["--values", str(path)]
    return words


def render(
    folder: Path, name: str = "startup", values: Mapping[str, Any] | None = None
) -> subprocess.CompletedProcess[str]:
    """What `helm template` says of a value set and of more values, whether it fails or not."""
    chart = whole_chart(folder)
    words = words_of(chart, name, values or {}, folder)
    return helm("template", RELEASE, *words, "--namespace", "seamark", "--kube-version", KUBERNETES)


def objects(folder: Path, name: str = "startup", values: Mapping[str, Any] | None = None) -> list[Object]:
    """The rendered objects."""
    done = render(folder, name, values)
    assert done.returncode == 0, done.stderr
    return [each for each in yaml.safe_load_all(done.stdout) if each]


def notes(folder: Path, name: str) -> str:
    """What `helm install` prints at its end. Only a cluster would make it say so: here the text is rendered as an object."""
    chart = folder / "noted/seamark"
    if not chart.exists():
        shutil.copytree(whole_chart(folder), chart)
        shutil.move(chart / "templates/NOTES.txt", chart / "notes.txt")
        (chart / "templates/notes.yaml").write_text('notes: {{ tpl (.Files.Get "notes.txt") . | quote }}\n')
    words = words_of(chart, name, {}, folder)
    done = helm(
        "template",
        RELEASE,
        *words,
        "--namespace",
        "seamark",
        "--kube-version",
        KUBERNETES,
        "--show-only",
        "templates/notes.yaml",
    )
    assert done.returncode == 0, done.stderr
    return str(yaml.safe_load(done.stdout)["notes"])


def of_kind(rendered: Sequence[Object], *kinds: str) -> list[Object]:
    return [each for each in rendered if each["kind"] in kinds]


def named(rendered: Sequence[Object], kind: str, name: str) -> Object:
    [found] = [each for each in of_kind(rendered, kind) if each["metadata"]["name"] == name]
    return found


def pods(rendered: Sequence[Object]) -> Iterator[tuple[str, Object]]:
    """Name and pod (metadata and spec) of everything that runs."""
    for each in rendered:
        name = f"{each['kind']}/{each['metadata']['name']}"
        if each["kind"] == "Pod":
            yield name, each
        elif "template" in each.get("spec", {}):
            yield name, each["spec"]["template"]


def containers(pod: Object) -> list[Object]:
    """Those that come first and those that stay."""
    return [*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]]


def parse_command(words: Sequence[str]) -> None:
    """Read a command line as `seamark` does, and run nothing; a mistake in it is a `UsageError`."""
    command: Any = typer.main.get_command(app)
    name, rest = "seamark", list(words)
    while hasattr(command, "commands"):
        assert rest, f"{name} alone does nothing"
        name, rest = rest[0], rest[1:]
        assert name in command.commands, f"there is no command {name} among {sorted(command.commands)}"
        command = command.commands[name]
    command.make_context(name, rest)


def stop_seconds_max(role: str) -> float:
    """How long a role takes at most from the signal to its end."""
    return worker.STOP_SECONDS_MAX if role == "worker" else process.STOP_SECONDS_MAX


def schemas(folder: Path, rendered: Sequence[Object]) -> Path:
    """Kubernetes' schemas of the kinds that are rendered, each with all it refers to in one file, as kubeconform reads them."""
    source = kubernetes_schemas()
    assert source is not None
    everything = json.loads((source / "_definitions.json").read_text())["$defs"]
    target = folder / "schemas"
    target.mkdir(exist_ok=True)
    for each in rendered:
        group, _, version = each["apiVersion"].rpartition("/")
        words = [each["kind"].lower(), *([group.removesuffix(".k8s.io").partition(".")[0]] if group else []), version]
        path = source / f"{'-'.join(words)}.json"
        if path.exists():
            (target / path.name).write_text(_self_contained(path.read_text(), everything))
    return target


_OUTSIDE: Final = "/api/_definitions.json#"
"""The file that all kinds share, by an address that only the package's own command knows."""


def _self_contained(text: str, everything: Mapping[str, Any]) -> str:
    schema = json.loads(text.replace(_OUTSIDE, "#"))
    del schema["$id"]  # what is referred to would be looked for there
    wanted: list[Any] = [schema]
    found: dict[str, Any] = {}
    while wanted:
        for name in _references(wanted.pop()):
            if name not in found:
                found[name] = everything[name]
                wanted.append(found[name])
    return json.dumps({**schema, "$defs": found})


def _references(schema: Any) -> Iterator[str]:
    if isinstance(schema, dict):
        reference = schema.get("$ref")
        if isinstance(reference, str) and "/" in reference:
            yield reference.rpartition("/")[2]
        for each in schema.values():
            yield from _references(each)
    elif isinstance(schema, list):
        for each in schema:
            yield from _references(each)


def kubeconform(folder: Path, rendered: Sequence[Object]) -> dict[str, Any]:
    """Its verdict over all objects: `resources` that it does not take, and the sums in `summary`."""
    program = tool("kubeconform")
    assert program is not None
    kinds = "{{.ResourceKind}}{{.KindSuffix}}.json"
    words = [program, "-strict", "-summary", "-output", "json", "-kubernetes-version", KUBERNETES]
    for place in (schemas(folder, rendered), OWN_SCHEMAS):
        words += ["-schema-location", f"{place}/{kinds}"]
    done = subprocess.run(words, input=yaml.safe_dump_all(rendered), capture_output=True, text=True, timeout=60)
    verdict: dict[str, Any] = json.loads(done.stdout)
    return verdict


def deployments(rendered: list[Object]) -> Iterator[tuple[str, str, Object]]:
    """Each Deployment's name, role and pod."""
    for each in of_kind(rendered, "Deployment"):
        pod = each["spec"]["template"]
        yield each["metadata"]["name"], pod["spec"]["containers"][0]["command"][1], pod


def allowed(rendered: list[Object], component: str) -> tuple[list[Object], list[Object]]:
    """What may connect to the pods of a component, and what they may connect to."""
    ingress, egress = [], []
    [labels] = [
        pod["metadata"]["labels"]
        for _, pod in pods(rendered)
        if pod["metadata"]["labels"]["app.kubernetes.io/component"] == component
    ]
    for policy in of_kind(rendered, "NetworkPolicy"):
        if policy["spec"]["podSelector"].get("matchLabels", {}).items() <= labels.items():
            assert policy["spec"]["policyTypes"] == ["Ingress", "Egress"]
            ingress += policy["spec"].get("ingress", [])
            egress += policy["spec"].get("egress", [])
    return ingress, egress


def ports_of(rules: list[Object]) -> set[int]:
    return {port["port"] for rule in rules for port in rule["ports"]}
