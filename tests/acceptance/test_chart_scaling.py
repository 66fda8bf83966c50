"""How the chart scales roles, and by what."""

from __future__ import annotations

from pathlib import Path

import yaml

import engine.metrics
import gateway.metrics
import projections.metrics
from engine.jobs.messages import LANES, job_consumer
from engine.worker.providers import SENT_BY_WORKERS
from seamark.protocol.subjects import JOBS_STREAM
from tests.support.charts import (
    BY_JOBS,
    CHART,
    NAME,
    deployments,
    named,
    needs_helm,
    objects,
    of_kind,
)

pytestmark = needs_helm


def test_gateways_are_counted_by_a_metric_that_they_have(folder: Path) -> None:
    name = gateway.metrics.gateway_sessions.describe()[0].name
    [hpa] = of_kind(objects(folder, "mid-scale"), "HorizontalPodAutoscaler")
    assert hpa["spec"]["metrics"][0]["pods"]["metric"]["name"] == name
    keda = named(objects(folder, "high-scale"), "ScaledObject", f"{NAME}-gateway")
    assert f"sum({name}{{" in keda["spec"]["triggers"][0]["metadata"]["query"]
    for scaled in (hpa, keda):
        target = scaled["spec"]["scaleTargetRef"]["name"]
        assert target == f"{NAME}-gateway"
    for which in ("mid-scale", "high-scale"):
        deployment = named(objects(folder, which), "Deployment", f"{NAME}-gateway")
        assert "replicas" not in deployment["spec"], "an upgrade would take back what was scaled"


def test_nothing_is_scaled_by_lag_unless_it_is_asked_for(folder: Path) -> None:
    for which in ("startup", "mid-scale"):
        found = objects(folder, which)
        assert of_kind(found, "ScaledObject") == []
        numbers = {
            role: named(found, "Deployment", name)["spec"].get("replicas") for name, role, _ in deployments(found)
        }
        assert all(number for role, number in numbers.items() if role != "gateway")


def test_projectors_planners_and_workers_are_scaled_by_what_waits_up_to_a_cap(folder: Path) -> None:
    found = objects(folder, "high-scale")
    seconds = {
        f"{NAME}-planner": engine.metrics.planner_lag.describe()[0].name,
        f"{NAME}-projector": projections.metrics.projection_lag.describe()[0].name,
    }
    jobs = {f"{NAME}-worker-{channel}": {job_consumer(channel, lane) for lane in LANES} for channel in SENT_BY_WORKERS}
    scaled = {each["metadata"]["name"]: each["spec"] for each in of_kind(found, "ScaledObject")}
    assert scaled.keys() == {f"{NAME}-gateway"} | seconds.keys() | jobs.keys()
    values = yaml.safe_load((CHART / "sets/high-scale.yaml").read_text())
    partitions = values["global"]["seamark"]["demand"]["partitions"]
    for name in seconds.keys() | jobs.keys():
        spec = scaled[name]
        assert "replicas" not in named(found, "Deployment", spec["scaleTargetRef"]["name"])["spec"]
        assert spec["scaleTargetRef"]["name"] == name
        assert 1 <= spec["minReplicaCount"] < spec["maxReplicaCount"] <= partitions
        told = [trigger["metadata"] for trigger in spec["triggers"]]
        if name in seconds:
            [only] = told
            assert only["query"].startswith(f"max({seconds[name]}{{")
            assert f"{name}-.*" in only["query"]
            assert only["serverAddress"].startswith("http")
        else:
            assert {one["consumer"] for one in told} == jobs[name]
            assert {one["stream"] for one in told} == {JOBS_STREAM}


def test_a_worker_of_all_channels_is_scaled_by_those_that_are_named(folder: Path) -> None:
    by = {"scaleByLag": {"worker": {"enabled": True, "channels": ["push", "sms"]}}}
    [scaled] = of_kind(objects(folder, values=by), "ScaledObject")
    asked = [trigger["metadata"]["consumer"] for trigger in scaled["spec"]["triggers"]]
    assert asked == [job_consumer(channel, lane) for channel in ("push", "sms") for lane in LANES]


def test_keda_asks_the_monitoring_of_the_release_or_of_nats_elsewhere(folder: Path) -> None:
    ours = objects(folder, values=BY_JOBS)
    elsewhere = {
        "nats": {"enabled": False},
        "externalNats": {"urls": ["tls://n1.example.com:4222"], "monitorUrls": ["https://n1.example.com:8222"]},
    }
    [inside], [outside] = (
        of_kind(found, "ScaledObject") for found in (ours, objects(folder, values=elsewhere | BY_JOBS))
    )
    told = inside["spec"]["triggers"][0]["metadata"]
    [servers] = of_kind(ours, "StatefulSet")
    headless = named(ours, "Service", servers["spec"]["serviceName"])
    host, _, port = told["natsServerMonitoringEndpoint"].partition(":")
    assert host == f"{headless['metadata']['name']}.seamark.svc", "KEDA is in another namespace"
    assert int(port) in {each["port"] for each in headless["spec"]["ports"]}
    told = outside["spec"]["triggers"][0]["metadata"]
    assert told["natsServerMonitoringEndpoint"] == "n1.example.com:8222"
    assert told["useHttps"] == "true"
