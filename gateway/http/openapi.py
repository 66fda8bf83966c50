"""The OpenAPI document, made from the declared endpoints."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from http import HTTPStatus
from importlib.metadata import version
from inspect import cleandoc
from typing import Any, Final

import msgspec

from gateway.access.principals import Operator, Service, User
from gateway.http.endpoint import Endpoint
from gateway.http.idempotency import HEADER, REPLAYED
from gateway.http.limits import IDEMPOTENCY_KEY_BYTES
from gateway.http.problems import CONTENT_TYPE, Kind, ProblemDocument

_REF: Final = "#/components/schemas/{name}"

_SCHEMES: Final[dict[type, tuple[str, dict[str, str]]]] = {
    User: ("user", {"type": "http", "scheme": "bearer", "bearerFormat": "JWT", "description": "A user's token."}),
    Service: ("service", {"type": "http", "scheme": "bearer", "description": "The API key of a service."}),
    Operator: ("operator", {"type": "http", "scheme": "bearer", "description": "The API key of an operator."}),
}

_KEY: Final = {
    "name": HEADER,
    "in": "header",
    "required": False,
    "schema": {"type": "string", "minLength": 1, "maxLength": IDEMPOTENCY_KEY_BYTES},
    "description": f"Sent again with the same key and body within a day, the request is answered as before ({REPLAYED}: true).",
}


def document(endpoints: Sequence[Endpoint]) -> dict[str, Any]:
    """What they take and answer, as OpenAPI 3.1."""
    bodies = [form for one in endpoints for form in (one.body, one.answer) if form is not None]
    queries = [one.query for one in endpoints if one.query is not None]
    _, parameters = msgspec.json.schema_components(queries, ref_template=_REF)
    schemas, components = msgspec.json.schema_components([*bodies, ProblemDocument], ref_template=_REF)
    schema_of = dict(zip(bodies, schemas, strict=False))
    paths: dict[str, dict[str, Any]] = defaultdict(dict)
    for one in endpoints:
        paths[one.path][one.method.lower()] = _operation(one, parameters, schema_of)
    return {
        "openapi": "3.1.0",
        "info": {"title": "Seamark", "version": version("seamark")},
        "paths": paths,
        "components": {"schemas": components, "securitySchemes": dict(_SCHEMES.values())},
    }


def _operation(one: Endpoint, parameters: dict[str, Any], schema_of: dict[Any, Any]) -> dict[str, Any]:
    summary, _, rest = (one.handler.__doc__ or "").partition("\n")
    answer = {} if one.answer is None else _content("application/json", schema_of[one.answer])
    found: dict[str, Any] = {
        "operationId": one.handler.__name__,
        "summary": summary,
        "description": cleandoc(rest),
        "security": [{_SCHEMES[kind][0]: [one.scope] if kind is Service else []} for kind in one.principals],
        "parameters": [
            *(_parameters(one, parameters[one.query.__name__]) if one.query is not None else ()),
            *((_KEY,) if one.keyed else ()),
        ],
        "responses": {
            **_problems(one.problems),
            **{str(status): {"description": HTTPStatus(status).phrase, **answer} for status in (one.status, *one.also)},
        },
    }
    if one.body is not None:
        found["requestBody"] = {
            "required": not one.empty_body,
            **_content("application/json", schema_of[one.body]),
        }
    return found


def _parameters(one: Endpoint, form: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {"name": name, "in": one.parameters[name], "required": name in form["required"], "schema": schema}
        for name, schema in form["properties"].items()
    ]


def _problems(kinds: Iterable[Kind]) -> dict[str, Any]:
    """By status, with the codes that it can have."""
    codes: dict[int, list[str]] = defaultdict(list)
    for kind in sorted(kinds):
        codes[kind.status].append(kind.code)
    problem = {"$ref": _REF.format(name=ProblemDocument.__name__)}
    return {
        str(status): {
            "description": ", ".join(listed),
            **_content(CONTENT_TYPE, {"allOf": [problem, {"properties": {"code": {"enum": listed}}}]}),
        }
        for status, listed in codes.items()
    }


def _content(content_type: str, schema: Any) -> dict[str, Any]:
    return {"content": {content_type: {"schema": schema}}}
