"""What the chart lets its pods do on their machine, and reach: what they work with, and nothing else."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest

from engine.worker.providers import SENT_BY_WORKERS
from tests.support.charts import (
    NAME,
    ROLES,
    Object,
    allowed,
    containers,
    needs_helm,
    objects,
    of_kind,
    pods,
    ports_of,
)

pytestmark = needs_helm


def violations(pod: Object) -> list[str]:
    """What the restricted pod security standard refuses (https://kubernetes.io/docs/concepts/security/pod-security-standards/),
    and what this project asks for besides: no token of Kubernetes', a root file system that is read only, bounds for memory."""
    spec, said = pod["spec"], []
    ours = spec.get("securityContext", {})
    said += [f"{field} is set" for field in ("hostNetwork", "hostPID", "hostIPC") if spec.get(field)]
    kinds = {"configMap", "emptyDir", "projected", "secret", "persistentVolumeClaim", "downwardAPI", "csi", "ephemeral"}
    said += [f"volume {each['name']}" for each in spec.get("volumes", []) if not kinds & each.keys()]
    if spec.get("automountServiceAccountToken") is not False:
        said.append("it gets a token of Kubernetes'")
    for each in containers(pod):
        own = each.get("securityContext", {})
        told = {**ours, **own}
        said += [
            f"{each['name']}: {what}"
            for what, met in (
                ("may become more", own.get("allowPrivilegeEscalation") is False),
                ("has capabilities", own.get("capabilities") == {"drop": ["ALL"]}),
                ("may be root", told.get("runAsNonRoot") is True and told.get("runAsUser", 0) > 0),
                ("has no seccomp profile", told.get("seccompProfile", {}).get("type") == "RuntimeDefault"),
                ("may write to its image", own.get("readOnlyRootFilesystem") is True),
                ("takes ports of the host", not any("hostPort" in port for port in each.get("ports", []))),
                ("takes all the memory there is", "memory" in each.get("resources", {}).get("limits", {})),
            )
            if not met
        ]
    return said


def test_every_pod_meets_the_restricted_standard(rendered: list[Object]) -> None:
    found = {name: violations(pod) for name, pod in pods(rendered)}
    assert len(found) >= len(ROLES) + 3, "roles, migration, topology, NATS"
    assert {name: said for name, said in found.items() if said} == {}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda pod: pod["spec"].update(hostNetwork=True), "hostNetwork is set"),
        (lambda pod: pod["spec"].pop("securityContext"), "may be root"),
        (lambda pod: pod["spec"]["containers"][0].pop("securityContext"), "has capabilities"),
        (lambda pod: pod["spec"]["volumes"].append({"name": "disk", "hostPath": {"path": "/"}}), "volume disk"),
    ],
)
def test_a_pod_that_could_do_more_would_be_found(
    startup: list[Object], change: Callable[[Object], Any], said: str
) -> None:
    pod = copy.deepcopy(dict(pods(startup))[f"Deployment/{NAME}-gateway"])
    change(pod)
    assert any(said in each for each in violations(pod))


WAYS_OUT: Final = {
    "gateway": {53, 4222, 8222, 6379, 5432, 443},
    "dispatcher": {53, 4222, 8222, 6379},
    "projector": {53, 4222, 8222, 6379, 5432},
    "planner": {53, 4222, 8222, 6379, 5432},
    "pager": {53, 4222, 8222, 5432},
    "worker-push": {53, 4222, 8222, 6379, 5432, 443, 465, 587},
    "migrate": {53, 5432},
    "topology": {53, 4222, 8222},
    "nats": {53, 6222},
}


@pytest.mark.parametrize("component", WAYS_OUT)
def test_a_pod_reaches_what_it_works_with_and_nothing_else(folder: Path, component: str) -> None:
    found = objects(folder, "mid-scale")
    ingress, egress = allowed(found, component)
    assert ports_of(egress) == WAYS_OUT[component]
    assert all(rule["to"] for rule in egress), "no rule is for everybody"
    came = {"gateway": {8080, 9090}, "migrate": set(), "topology": set(), "nats": {4222, 6222, 8222}}
    assert ports_of(ingress) == came.get(component, {9090})
    assert all(rule["from"] for rule in ingress)


def ways_outside(rendered: list[Object]) -> dict[str, set[int]]:
    """The ports by which pods reach addresses of the internet, by component."""
    found: dict[str, set[int]] = {}
    for _, pod in pods(rendered):
        component = pod["metadata"]["labels"]["app.kubernetes.io/component"]
        _, egress = allowed(rendered, component)
        for rule in egress:
            if any(peer.get("ipBlock", {}).get("cidr") == "0.0.0.0/0" for peer in rule["to"]):
                found[component] = found.get(component, set()) | ports_of([rule])
    return found


def test_only_workers_reach_the_outside_and_gateways_what_signatures_are_checked_by(folder: Path) -> None:
    providers = WAYS_OUT["worker-push"] - WAYS_OUT["planner"]
    assert ways_outside(objects(folder)) == {"worker": providers}
    workers = {f"worker-{channel}": providers for channel in SENT_BY_WORKERS}
    assert ways_outside(objects(folder, "mid-scale")) == workers | {"gateway": {443}}, "the key set of tokens"
    callbacks: dict[str, Any] = {"sending": {"callbacksSecret": "seamark-callbacks"}}
    assert ways_outside(objects(folder, values=callbacks)) == {"worker": providers, "gateway": {443}}
    none = callbacks | {"networkPolicy": {"certificates": {"to": []}}}
    assert ways_outside(objects(folder, values=none)) == {"worker": providers}
    narrow = {"networkPolicy": {"providers": {"ports": [2525], "to": [{"ipBlock": {"cidr": "10.1.2.3/32"}}]}}}
    _, egress = allowed(objects(folder, values=narrow), "worker")
    assert egress[-1] == {"to": [{"ipBlock": {"cidr": "10.1.2.3/32"}}], "ports": [{"port": 2525}]}


def test_nothing_is_allowed_that_no_policy_names(rendered: list[Object]) -> None:
    [closed] = [
        each for each in of_kind(rendered, "NetworkPolicy") if each["metadata"]["name"].endswith("-nothing-else")
    ]
    assert closed["spec"].keys() == {"podSelector", "policyTypes"}
    for name, pod in pods(rendered):
        assert closed["spec"]["podSelector"]["matchLabels"].items() <= pod["metadata"]["labels"].items(), name
