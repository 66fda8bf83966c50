"""Holds answers of a gateway against its OpenAPI document: what is not declared there must not be answered."""

from __future__ import annotations

import json
import re
from typing import Any

import aiohttp

from gateway.api.endpoints import ENDPOINTS
from gateway.http.openapi import document

DOCUMENT = json.loads(json.dumps(document(ENDPOINTS)))
"""As a client reads it."""

_PATHS = {path: re.compile(re.sub(r"\{[^}]+\}", "[^/]+", path)) for path in DOCUMENT["paths"]}
_TYPES: dict[str, Any] = {
    "object": dict, "array": list, "string": str, "boolean": bool, "integer": int, "number": (int, float), "null": type(None),
}  # fmt: skip


async def conforming(request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType) -> aiohttp.ClientResponse:
    """Middleware of a client whose every answer must be a declared one."""
    response = await handler(request)
    operation = operation_of(request.method, request.url.raw_path)
    if operation is None:
        return response
    said = f"{request.method} {request.url.raw_path} answered {response.status}"
    assert str(response.status) in operation["responses"], f"{said}, which is not declared"
    for content_type, content in operation["responses"][str(response.status)].get("content", {}).items():
        assert response.content_type == content_type, f"{said} as {response.content_type}"
        check(json.loads(await response.read()), content["schema"], said)
    return response


def operation_of(method: str, path: str) -> dict[str, Any] | None:
    """What the document says of a request; None: nothing, such as of a page or a preflight."""
    for declared, pattern in _PATHS.items():
        if pattern.fullmatch(path):
            return DOCUMENT["paths"][declared].get(method.lower())
    return None


def check(value: Any, schema: dict[str, Any], where: str) -> None:
    """Pass a value of the form that `schema` tells.

    Raises:
        AssertionError: with the place where it is none.
    """
    if "$ref" in schema:
        check(value, DOCUMENT["components"]["schemas"][schema["$ref"].rpartition("/")[2]], where)
    for part in schema.get("allOf", ()):
        check(value, part, where)
    if "anyOf" in schema:
        assert any(fits(value, part, where) for part in schema["anyOf"]), f"{where}: {value!r} is no {schema['anyOf']}"
    if "enum" in schema:
        assert value in schema["enum"], f"{where}: {value!r} is none of {schema['enum']}"
    if "type" in schema:
        assert isinstance(value, _TYPES[schema["type"]]), f"{where}: {value!r} is no {schema['type']}"
    if isinstance(value, dict):
        assert set(schema.get("required", ())) <= set(value), f"{where}: {schema['required']} are not all in {value}"
        known = schema.get("properties", {})
        if known and "title" in schema:  # a struct of ours: whatever is in it is declared
            assert set(value) <= set(known), f"{where}: {set(value) - set(known)} are not declared"
        for name in value.keys() & known.keys():
            check(value[name], known[name], f"{where}.{name}")
    if isinstance(value, list):
        for index, item in enumerate(value):
            check(item, schema.get("items", {}), f"{where}[{index}]")


def fits(value: Any, schema: dict[str, Any], where: str) -> bool:
    """Whether `check` passes it."""
    try:
        check(value, schema, where)
    except AssertionError:
        return False
    return True
