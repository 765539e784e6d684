"""How model families write tool calls: each a value, which `parser.CallsParser` and its readers follow.

A call names its function in its JSON object, or in a head before the object with its arguments, or it writes its
arguments one by one between tags. A format that is new but alike is a new value here.
"""

from __future__ import annotations

import re
import secrets
import string
from collections.abc import Callable
from dataclasses import dataclass

_MISTRAL_ID = string.ascii_letters + string.digits
_NAME = r"(?P<name>[\w.:/-]+)"


def new_call_id() -> str:
    """Return an id that looks as OpenAI's do."""
    return f"call_{secrets.token_hex(12)}"


def new_mistral_call_id() -> str:
    """Return nine letters and digits: Mistral's templates refuse others."""
    return "".join(secrets.choice(_MISTRAL_ID) for _ in range(9))


@dataclass(frozen=True, slots=True)
class Tags:
    """What arguments stand between that are written one by one: pairs of what opens and what closes."""

    name: tuple[str, str]
    key: tuple[str, str]
    value: tuple[str, str]
    end: str = ""  # behind the last of them; "": where the calls end
    pads_values: bool = False  # a value has a line of its own


@dataclass(frozen=True, slots=True)
class CallFormat:
    """One way to write calls. `starts`, `ends`: marks around one call, or around all of them."""

    starts: tuple[str, ...] = ()
    ends: tuple[str, ...] = ()  # none: calls reach to the end of the output
    call_marks: tuple[str, ...] = ()  # inside: what stands around each call and in its head; the last one ends it
    head: re.Pattern[str] | None = None  # finds the `name`, perhaps the `id`, in what stands before the arguments
    tags: Tags | None = None
    is_bare: bool = False  # an answer that begins with a brace or a bracket is calls
    has_special_marks: bool = False  # whether tokenizers have the marks as special tokens, which the text must show
    new_id: Callable[[], str] = new_call_id  # where the model does not write one

    @property
    def marks(self) -> tuple[str, ...]:
        """Return all marks that no text should have."""
        return self.starts + self.ends + self.call_marks


BARE = CallFormat(is_bare=True)
HERMES = CallFormat(("<tool_call>",), ("</tool_call>",))
LLAMA = CallFormat(("<|python_tag|>",), is_bare=True, has_special_marks=True)
MISTRAL = CallFormat(
    ("[TOOL_CALLS]",),
    head=re.compile(rf"^{_NAME}(?:\[CALL_ID\](?P<id>\w+))?(?:\[ARGS\])?\s*$"),
    has_special_marks=True,
    new_id=new_mistral_call_id,
)
GRANITE = CallFormat(("<|tool_call|>", "<tool_call>"), ("<|/tool_call|>", "</tool_call>"), has_special_marks=True)
GRANITE_20B = CallFormat(("<function_call>",))
QWEN3_CODER = CallFormat(
    ("<tool_call>", "<function="),  # models forget the former
    ("</tool_call>",),
    tags=Tags(("<function=", ">"), ("<parameter=", ">"), ("", "</parameter>"), "</function>", pads_values=True),
)
GLM = CallFormat(
    ("<tool_call>",),
    ("</tool_call>",),
    tags=Tags(("", ""), ("<arg_key>", "</arg_key>"), ("<arg_value>", "</arg_value>")),
    has_special_marks=True,
)
KIMI = CallFormat(
    ("<|tool_calls_section_begin|>", "<|tool_call_section_begin|>"),  # models write both
    ("<|tool_calls_section_end|>", "<|tool_call_section_end|>"),
    ("<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"),
    # The template writes the id back, so it has to be the model's own.
    re.compile(
        r"<\|tool_call_begin\|>\s*(?P<id>(?:functions\.)?(?P<name>[\w.:/-]+?)(?::\d+)?)\s*<\|tool_call_argument_begin\|>"
    ),
    has_special_marks=True,
)
DEEPSEEK = CallFormat(
    ("<｜tool▁calls▁begin｜>",),
    ("<｜tool▁calls▁end｜>",),
    ("<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"),
    # V3.1 writes the name, V3 the type before it and a fence around the arguments.
    re.compile(
        rf"<｜tool▁call▁begin｜>\s*(?:function\s*<｜tool▁sep｜>\s*)?{_NAME}\s*(?:<｜tool▁sep｜>\s*)?(?:```(?:json)?\s*)?$"
    ),
    has_special_marks=True,
)
HARMONY = CallFormat(has_special_marks=True)  # `harmony.Channels` reads it

TOOL_FORMATS: dict[str, CallFormat] = {  # by vLLM's names
    "deepseek_v3": DEEPSEEK,
    "deepseek_v31": DEEPSEEK,
    "glm45": GLM,
    "glm47": GLM,
    "granite": GRANITE,
    "granite-20b-fc": GRANITE_20B,
    "granite4": GRANITE,
    "hermes": HERMES,
    "kimi_k2": KIMI,
    "llama3": LLAMA,
    "llama3_json": LLAMA,
    "llama4_json": LLAMA,
    "mistral": MISTRAL,
    "openai": HARMONY,
    "qwen": HERMES,
    "qwen2_5": HERMES,
    "qwen3_coder": QWEN3_CODER,
    "qwen3_xml": QWEN3_CODER,
}

# What a template shows -> the format it shows, the first that fits: several have <tool_call>.
_SHOWN = (
    (("<|channel|>", "<|message|>"), "openai"),
    (("<arg_key>",), "glm45"),
    (("<function=", "<parameter="), "qwen3_coder"),
    (("<|tool_call_begin|>",), "kimi_k2"),
    (("<|im_middle|>",), "kimi_k2"),  # older templates show the tools, and no calls
    (("<｜tool▁calls▁begin｜>", "```json"), "deepseek_v3"),
    (("<｜tool▁calls▁begin｜>",), "deepseek_v31"),
    (("<|tool_call|>",), "granite"),
    (("<function_call>",), "granite-20b-fc"),
    (("<tool_call>",), "hermes"),
    (("[TOOL_CALLS]",), "mistral"),
    (("<|python_tag|>",), "llama3_json"),
    (("<|start_header_id|>",), "llama3_json"),
)


def format_of_template(source: str | None) -> str | None:
    """Return the name of the format that a chat template shows of calls; None if it shows none."""
    if source is None or "tools" not in source:
        return None
    return next((name for marks, name in _SHOWN if all(mark in source for mark in marks)), None)
