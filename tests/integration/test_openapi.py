"""Endpoints are what they are declared to be: every request that tests make of a gateway is held against its document, too."""

import json
import re
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.baggage.propagation import W3CBaggagePropagator
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from structlog.testing import capture_logs

from gateway.access.principals import Service
from gateway.api.endpoints import ENDPOINTS
from gateway.server import create_app
from ops.dev.servers import NatsServer
from tests.support.gateways import gateway_on
from tests.support.openapi import DOCUMENT, fits, operation_of
from tests.support.tokens import bearer


async def test_the_document_is_served_and_names_every_route_but_those_of_the_development_page(
    nats_server: NatsServer,
) -> None:
    async with gateway_on(nats_server) as gateway:
        async with gateway.http.get(f"{gateway.url}/openapi.json") as response:
            assert await response.json() == DOCUMENT
        app = create_app(gateway.context, gateway_options(nats_server))
        routed = {(route.method, route.resource.canonical) for route in app.router.routes() if route.resource}
    declared = {(one.method, one.path) for one in ENDPOINTS if one.status != 101}
    assert {route for route in routed if route[0] not in ("OPTIONS", "HEAD")} == declared
    assert {path for method, path in routed if method == "OPTIONS"} == {one.path for one in ENDPOINTS}


def gateway_options(nats: NatsServer) -> Any:
    from engine.broker.jetstream import NatsSettings
    from gateway.options import GatewayOptions

    return GatewayOptions(nats=NatsSettings(nats.url))


def test_every_reference_leads_somewhere_and_every_operation_has_a_name_and_a_sentence() -> None:
    text = json.dumps(DOCUMENT)
    assert set(re.findall(r'"#/components/schemas/([^"]+)"', text)) <= set(DOCUMENT["components"]["schemas"])
    operations = [one for methods in DOCUMENT["paths"].values() for one in methods.values()]
    names = [one["operationId"] for one in operations]
    assert len(set(names)) == len(names) == len(ENDPOINTS)
    assert all(one["summary"].endswith(".") for one in operations)
    for path, methods in DOCUMENT["paths"].items():
        for one in methods.values():
            in_path = {parameter["name"] for parameter in one["parameters"] if parameter["in"] == "path"}
            assert in_path == set(re.findall(r"\{([^}]+)\}", path))
            assert all(p["required"] for p in one["parameters"] if p["in"] == "path")


def test_whoever_takes_keys_of_services_says_what_they_must_allow() -> None:
    assert all((one.scope is not None) == (Service in one.principals) for one in ENDPOINTS)


def test_an_answer_that_is_not_declared_is_noticed() -> None:
    operation = operation_of("GET", "/v1/notifications/x/trace")
    assert operation is not None
    problem = operation["responses"]["404"]["content"]["application/problem+json"]["schema"]
    said = {"type": "t", "title": "t", "status": 404, "detail": "d", "code": "not_found", "request_id": "r"}
    assert fits(said, problem, "")
    for wrong in ({"code": "gone"}, {"status": "404"}, {"more": 1}, {"field": 7}):
        assert not fits({**said, **wrong}, problem, "")
    assert not fits({name: said[name] for name in said if name != "code"}, problem, "")


@pytest.mark.parametrize(("given", "kept"), [
    ("order-17/try=2", True), ("x" * 128, True), ("x" * 129, False), ("a b", False), ("ä", False), ("", False),
])  # fmt: skip
async def test_a_request_is_found_in_the_log_by_the_id_in_its_answer(
    nats_server: NatsServer, given: str, kept: bool
) -> None:
    async with gateway_on(nats_server) as gateway:
        headers = {**bearer(), "X-Request-Id": given}
        with capture_logs() as lines:
            async with gateway.http.get(f"{gateway.url}/v1/records", headers=headers) as response:
                problem = await response.json()
        id = response.headers["X-Request-Id"]
        assert (id == given) is kept
        assert re.fullmatch("[!-~]{1,128}", id)
        assert (problem["request_id"], problem["code"], problem["field"]) == (id, "invalid_query", "device")
        assert [line["request_id"] for line in lines if line["event"] == "request_refused"] == [id]
        async with gateway.http.get(f"{gateway.url}/v1/records?device=tab", headers=headers) as response:
            assert (response.status, response.headers["X-Request-Id"] == given) == (200, kept)
        refused: dict[str, Any] = {"headers": {"Origin": "https://evil.example", "X-Request-Id": given}}
        async with gateway.http.get(f"{gateway.url}/v1/ws", **refused) as response:
            problem = await response.json()
            assert (response.headers["X-Request-Id"] == given) is kept
            assert problem["request_id"] == response.headers["X-Request-Id"]


async def test_a_request_has_a_span_named_by_its_declaration_and_a_stream_has_none(
    nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    spans = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(spans))
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", provider)
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    async with gateway_on(nats_server) as gateway:
        # Baggage is not looked at: 8 KiB of blanks in it take OpenTelemetry half a second, in which no session gets anything.
        url, headers = gateway.url, {**bearer(), "traceparent": parent, "baggage": "a" + 8000 * " " + "b"}
        monkeypatch.setattr(W3CBaggagePropagator, "extract", lambda *given, **more: pytest.fail("baggage was read"))
        async with gateway.http.get(f"{url}/v1/notifications/of-alice/trace", headers=headers) as response:
            assert response.status == 503
        async with gateway.http.get(f"{url}/v1/stream?device=tab&cursor=start", headers=headers) as response:
            assert response.status == 200
        async with gateway.http.get(f"{url}/healthz") as response:
            assert response.status == 200
    traced, alive = spans.get_finished_spans()
    assert (traced.name, traced.kind) == ("GET /v1/notifications/{id}/trace", trace.SpanKind.SERVER)
    assert traced.attributes == {
        "http.request.method": "GET",
        "http.route": "/v1/notifications/{id}/trace",
        "http.response.status_code": 503,
        "error.type": "503",
    }
    assert (traced.status.status_code, alive.status.status_code) == (trace.StatusCode.ERROR, trace.StatusCode.UNSET)
    assert traced.parent is not None
    assert f"{traced.parent.trace_id:032x}" in parent
    assert (alive.name, alive.parent) == ("GET /healthz", None)
    assert "alice" not in str([span.to_json() for span in (traced, alive)])


def test_every_version_that_is_asked_for_has_the_bound_of_what_can_be_stored() -> None:
    operations = [one for methods in DOCUMENT["paths"].values() for one in methods.values()]
    asked = [one["schema"] for each in operations for one in each["parameters"] if one["name"] == "version"]
    asked.append(DOCUMENT["components"]["schemas"]["ActiveBody"]["properties"]["version"])
    bounds = [one for schema in asked for one in schema.get("anyOf", [schema]) if one["type"] != "null"]
    assert len(bounds) >= len(asked) > 10
    assert {one["maximum"] for one in bounds} == {2**63 - 1}
