"""Tools that a chat request offers, and what `tool_choice` makes of them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

from kunserve.api.ask.structured import calls_structure, json_structure
from kunserve.api.wire.fields import Fields, wrong_type, wrong_value
from kunserve.api.wire.grammars import Structure
from kunserve.errors import InvalidRequestError

_NAME = re.compile(r"[\w.:/-]{1,256}")


@dataclass(frozen=True, slots=True)
class Tools:
    """`mode` none: tools are shown to the model, and calls stay text; named: only `name` may be called."""

    definitions: list[dict[str, Any]]
    mode: Literal["none", "auto", "required", "named"] = "none"
    name: str = ""
    is_parallel: bool = True

    @property
    def structure(self) -> Structure | None:
        """Return what the output must be so that a call comes out for sure."""
        if self.mode == "named":
            return json_structure(self._parameters(self.name), "tool_choice")
        if self.mode != "required":
            return None
        names = [str(tool["function"]["name"]) for tool in self.definitions]
        functions = [{"name": name, "parameters": self._parameters(name)} for name in names]
        return calls_structure({"functions": functions, "is_parallel": self.is_parallel}, "tool_choice")

    def _parameters(self, name: str) -> dict[str, Any]:
        """Return the schema of a function's arguments: an object's, whether it says so or not."""
        function = next(tool["function"] for tool in self.definitions if tool["function"]["name"] == name)
        parameters: dict[str, Any] = function.get("parameters") or {"properties": {}}
        return parameters | {"type": "object"}


def read_tools(fields: Fields) -> Tools:
    """Check `tools`, `tool_choice` and `parallel_tool_calls`."""
    definitions = _read_definitions(fields.any("tools"))
    is_parallel = fields.boolean("parallel_tool_calls", True)
    choice = fields.any("tool_choice")
    if choice is None:
        choice = "auto" if definitions else "none"
    if not definitions and choice in ("none", "auto"):
        return Tools([])
    if not definitions:
        raise InvalidRequestError("`tool_choice` needs `tools`.", param="tool_choice")
    if choice in ("none", "auto", "required"):
        return Tools(definitions, choice, "", is_parallel)
    name = _read_named(choice)
    if all(tool["function"]["name"] != name for tool in definitions):
        raise InvalidRequestError(f"`tool_choice` names `{name[:100]}`, which is not in `tools`.", param="tool_choice")
    return Tools(definitions, "named", name, is_parallel)


def _read_named(choice: object) -> str:
    if isinstance(choice, str):
        wrong_value("tool_choice", "none, auto, required or a function", choice)
    if not isinstance(choice, dict):
        wrong_type("tool_choice", "a string or an object", choice)
    name = Fields(choice, "tool_choice.").object("function").string("name", None)
    if name is None:
        wrong_value("tool_choice", "an object with function.name", choice)
    return name


def _read_definitions(tools: object) -> list[dict[str, Any]]:
    if tools is None:
        return []
    if not isinstance(tools, list):
        wrong_type("tools", "a list of tools", tools)
    for index, tool in enumerate(tools):
        param = f"tools[{index}]"
        if not isinstance(tool, dict):
            wrong_type(param, "an object", tool)
        if tool.get("type", "function") != "function":
            raise InvalidRequestError(f"`{param}` is no function; nothing else is supported.", param="tools")
        function = Fields(tool, f"{param}.").object("function")
        name = function.string("name", None)
        if name is None or not _NAME.fullmatch(name):
            raise InvalidRequestError(f"`{param}.function.name` must be a word.", param="tools")
        parameters = function.mapping("parameters")
        for field in ("$defs", "definitions", "properties"):
            if not isinstance(parameters.get(field, {}), dict):
                wrong_type(f"{param}.function.parameters.{field}", "an object", parameters[field])
    return tools
