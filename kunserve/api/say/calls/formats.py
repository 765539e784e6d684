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

TOOL_FORMATS: dict[str, CallFormat] = {
    "hermes": HERMES,
    "qwen": HERMES,
    "qwen2_5": HERMES,
    "llama3_json": LLAMA,
    "llama3": LLAMA,
    "mistral": MISTRAL,
}


def format_of_template(source: str | None) -> str | None:
    """Return the name of the format that a chat template shows of calls; None if it shows none."""
    if source is None or "tools" not in source:
        return None
    for mark, name in (("<tool_call>", "hermes"), ("[TOOL_CALLS]", "mistral"), ("<|python_tag|>", "llama3_json")):
        if mark in source:
            return name
    return "llama3_json" if "<|start_header_id|>" in source else None
