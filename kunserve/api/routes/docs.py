"""GET /docs: the OpenAPI document as a page to read. No script: everything is in it, and every text is escaped."""

from __future__ import annotations

from html import escape
from typing import Any

from kunserve.api.ask.declared.fields import NOT_TAKEN

_HEAD = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>KunServe's API</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="stylesheet" href="/page/page.css">
</head><body><main><h1>KunServe's API</h1>
<p>The same for programs: <a href="/openapi.json">/openapi.json</a>.</p>
"""
_MAX_DEPTH = 4  # of objects in each other: deeper ones go by their type


def docs_page(document: dict[str, Any]) -> str:
    """Return the page of an OpenAPI document."""
    operations = [
        _operation(path, method, operation)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    ]
    return _HEAD + "".join(operations) + "</main></body></html>\n"


def _operation(path: str, method: str, operation: dict[str, Any]) -> str:
    title = f"<h2><code>{escape(method.upper())} {escape(path)}</code></h2><p>{escape(operation['summary'])}.</p>\n"
    body = operation.get("requestBody")
    return title + ("" if body is None else _fields(body["content"]["application/json"]["schema"]))


def _fields(schema: dict[str, Any], depth: int = 1) -> str:
    required = schema.get("required", [])
    items = []
    for name, of_field in schema["properties"].items():
        inner = _object_in(of_field) if depth < _MAX_DEPTH else None
        note = " (required)" if name in required else ""
        more = "" if inner is None else _fields(inner, depth + 1)
        items.append(f"<li><code>{escape(name)}</code>: {escape(type_of(of_field))}{note}{more}</li>\n")
    return f"<details{' open' if depth > 1 else ''}><summary>fields</summary><ul>{''.join(items)}</ul></details>\n"


def _object_in(schema: dict[str, Any]) -> dict[str, Any] | None:
    """Return the object with known fields that a schema allows, perhaps as an item of a list."""
    if schema.get("properties"):
        return schema
    inner = [*schema.get("anyOf", []), *([schema["items"]] if "items" in schema else [])]
    return next((found for found in map(_object_in, inner) if found is not None), None)


def type_of(schema: dict[str, Any]) -> str:
    """Return what a schema allows, in words."""
    if schema.get("description", "").startswith(NOT_TAKEN):
        return str(schema["description"])
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(type_of(each) for each in schema["anyOf"] if each != {"type": "null"}))
    if "enum" in schema:
        return ", ".join(map(str, schema["enum"]))
    if "const" in schema:
        return str(schema["const"])
    if schema.get("type") == "array":
        return f"list of {type_of(schema['items'])}" if "items" in schema else "list"
    if "type" not in schema:
        return "anything"
    bounds = [f"{word} {schema[name]:g}" for name, word in (("minimum", "from"), ("maximum", "to")) if name in schema]
    return " ".join([schema["type"], *bounds])
