"""`tool_choice` of type allowed_tools: some of the tools, so that a client need not change its list of them."""

from __future__ import annotations

from typing import Any

from kunserve.api.wire.fields import Fields, show, wrong_type
from kunserve.errors import InvalidRequestError


def with_allowed_tools(values: dict[str, Any]) -> dict[str, Any]:
    """Return the body with only those tools that a `tool_choice` of allowed tools leaves."""
    choice = values.get("tool_choice")
    if not isinstance(choice, dict) or choice.get("type") != "allowed_tools":
        return values
    allowed, tools = Fields(choice, "tool_choice.").object("allowed_tools"), values.get("tools")
    mode = allowed.choice("mode", ("auto", "required"))
    if not isinstance(named := allowed.required("tools"), list):
        wrong_type("tool_choice.allowed_tools.tools", "a list of tools", named)
    if not isinstance(tools, list) or not named:
        raise InvalidRequestError("`tool_choice` must allow at least one function of `tools`.", param="tool_choice")
    names = {_tool_name(tool) for tool in named}
    if unknown := names - {_tool_name(tool) for tool in tools} | names & {None}:
        text = f"`tool_choice` allows {show(sorted(map(str, unknown))[0])}, which is not in `tools`."
        raise InvalidRequestError(text, param="tool_choice")
    return {**values, "tools": [tool for tool in tools if _tool_name(tool) in names], "tool_choice": mode}


def _tool_name(tool: object) -> str | None:
    function = tool.get("function") if isinstance(tool, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    return name if isinstance(name, str) else None
