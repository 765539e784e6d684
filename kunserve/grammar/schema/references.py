"""In a structure's process: what `$ref` means in a schema, wherever its author put it and whatever it is called."""

from __future__ import annotations

from typing import Any
from urllib.parse import unquote

from kunserve.grammar.limits import RefusedError

REFERENCES = ("$ref", "$dynamicRef", "$recursiveRef")
_ANCHORS = ("$anchor", "$dynamicAnchor")


class References:
    """The places within one schema that its references lead to."""

    def __init__(self, root: Any) -> None:
        self._root = root
        self._named: dict[str, Any] | None = None

    def target(self, reference: object) -> Any:
        """Return the subschema that a reference leads to. Raises RefusedError if there is none here."""
        if not isinstance(reference, str):
            raise RefusedError("`$ref` must be a string")
        address, _, fragment = reference.partition("#")
        start = self._resource(address)
        if start is not None and (not fragment or fragment.startswith("/")):
            # Names are to be escaped in a reference; pydantic writes them as they are.
            for parts in (fragment.split("/")[1:], [unquote(part) for part in fragment.split("/")[1:]]):
                found = _follow(start, parts)
                if isinstance(found, dict | bool):
                    return found
        elif start is not None and fragment in self._names():
            return self._names()[fragment]
        raise RefusedError(f"its reference {reference[:100]!r} leads to no schema in it")

    def _resource(self, address: str) -> Any:
        if not address or (isinstance(self._root, dict) and self._root.get("$id") in (address, f"{address}#")):
            return self._root
        return self._names().get(address)

    def _names(self) -> dict[str, Any]:
        """Return all subschemas with a name of their own, by it: anchors, and what is told apart by its `$id`."""
        if self._named is None:
            self._named = {}
            waiting = [self._root]
            while waiting:
                value = waiting.pop()
                if isinstance(value, list):
                    waiting += value
                elif isinstance(value, dict):
                    waiting += value.values()
                    names = [value.get(keyword) for keyword in (*_ANCHORS, "$id", "id")]
                    self._named |= {name.removeprefix("#"): value for name in names if isinstance(name, str) and name}
        return self._named


def _follow(value: Any, parts: list[str]) -> Any:
    for part in parts:
        name = part.replace("~1", "/").replace("~0", "~")
        if isinstance(value, dict) and name in value:
            value = value[name]
        elif isinstance(value, list) and name.isdecimal() and int(name) < len(value):
            value = value[int(name)]
        else:
            return None
    return value
