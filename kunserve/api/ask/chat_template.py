"""Request flow, in the API: a conversation -> the prompt text that the model was trained on."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from kunserve.errors import ConfigError, InvalidRequestError


class ChatTemplate:
    """A model's Jinja template, compiled once, with Hugging Face's conventions, in a sandbox."""

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str] | None = None,
        now: Callable[[], datetime] = datetime.now,
    ) -> None:
        """Compile a template; ConfigError if that fails. `special_tokens`: bos_token, eos_token and so on."""
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda form: now().strftime(form)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ConfigError(f"the chat template does not compile: {error}") from None
        self._special_tokens = dict(special_tokens or {})

    def render(
        self,
        /,  # a client may name a variable `self`
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **kwargs: Any,
    ) -> str:
        """Return the prompt; `kwargs` are variables of this template (`enable_thinking`). Special tokens are in it.

        Raises InvalidRequestError when the template refuses the conversation or fails on it.
        """
        own = {"messages": messages, "tools": tools, "add_generation_prompt": add_generation_prompt}
        try:
            return self._template.render({**self._special_tokens, **kwargs, **own})
        except Exception as error:  # a template is a program: whatever it raises is about this conversation
            message = str(error) or type(error).__name__
            raise InvalidRequestError(f"the chat template failed: {message}", param="messages") from None


class _Generation(Extension):
    """`{% generation %}` marks the model's answers for training; here it is only its content."""

    tags = {"generation"}  # noqa: RUF012  # jinja2's protocol

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Write plain JSON: jinja2's own filter escapes it for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
