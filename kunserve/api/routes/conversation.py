"""A chat request made ready for the engine: prompt, constraint, and how its output is read; for all chat endpoints."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from aiohttp import web

from kunserve.api.ask.prompts import ChatPrompt, fit, spell, tokenize_chat
from kunserve.api.ask.protocol import ChatCall
from kunserve.api.ask.structured import compile_structure
from kunserve.api.ask.tools import Tools
from kunserve.api.say.answering import Form, answer, make_choices
from kunserve.api.say.reasoning import END, START, MessageParser, ThinkSplitter
from kunserve.api.say.tool_parsers import TOOL_PARSERS, JsonCalls, NamedCall, ToolParser
from kunserve.api.wire.access import owner_of
from kunserve.api.wire.admission import CHARS_PER_TOKEN
from kunserve.api.wire.context import Api
from kunserve.engine.text.constraint import GrammarConstraint
from kunserve.errors import InvalidRequestError
from kunserve.sampling import SamplingParams


@dataclass(frozen=True, slots=True)
class Conversation:
    """What the engine gets, and a parser for each choice (None: the output is the message)."""

    ids: list[int]
    params: SamplingParams
    constraint: GrammarConstraint | None
    new_parser: Callable[[], MessageParser] | None
    reasons: bool | None  # whether the prompt has begun the reasoning; None if none can come


async def converse(request: web.Request, api: Api, call: ChatCall, form: Form, answer_id: str) -> web.StreamResponse:
    """Answer a conversation, in the words of one endpoint."""
    generation, owner = call.generation, owner_of(request, call.generation.user)
    num_tokens = call.num_chars // CHARS_PER_TOKEN + len(call.messages)
    with api.admission.accepted(owner, generation.n, num_tokens * generation.n) as place:
        talk = await prepare(request, api, call)
        prompts = [(talk.ids, talk.params, None)]
        parsing = (talk.new_parser, talk.reasons)
        choices = await make_choices(api, answer_id, generation, owner, prompts, talk.constraint, *parsing)
        return await answer(request, api, form, choices, place)


async def prepare(request: web.Request, api: Api, call: ChatCall) -> Conversation:
    """Render, tokenize, compile. Raises KunServeError for whatever the client has to mend."""
    _tool_parser(call.tools, api.settings.tool_call_parser)  # refuse before any work
    prompt = await tokenize_chat(api, call)
    reasons = _reasons(api, prompt, call)
    structure = call.generation.structure or call.tools.structure
    constraint = await compile_structure(request, api, structure, call.generation.user, reasons is not None)
    bad_words = await spell(api, call.generation.bad_words)
    ids, params = fit(prompt.ids, call.generation, bad_words, api, "messages")
    if _marks_calls_by_special_tokens(call.tools, api.settings.tool_call_parser):
        params = replace(params, skip_special_tokens=False)

    def new_parser() -> MessageParser:
        tools = _tool_parser(call.tools, api.settings.tool_call_parser)
        think = None if reasons is None else ThinkSplitter(is_open=reasons)
        return MessageParser(think, tools, call.tools.is_parallel)

    needs_parser = reasons is not None or call.tools.mode != "none"
    return Conversation(ids, params, constraint, new_parser if needs_parser else None, reasons)


def _reasons(api: Api, prompt: ChatPrompt, call: ChatCall) -> bool | None:
    """Return whether the prompt has begun the reasoning, None where none can come.

    None can come if the model does not reason, if the template has closed the reasoning already (Qwen3 without
    thinking), or if the answer goes on with a message that is past it.
    """
    name, ending = api.settings.reasoning_parser, prompt.ending.rstrip()
    if name is None or ending.endswith(END):
        return None
    if call.continue_final_message and (begun := call.messages[-1]["content"]).strip():
        return True if begun.rfind(START) > begun.rfind(END) else None
    return name == "deepseek_r1" or ending.endswith(START)


def _tool_parser(tools: Tools, parser: str | None) -> ToolParser | None:
    """Return what takes calls out of one choice's text. `parser`: of the model's own format, used for `auto`."""
    match tools.mode:
        case "none":
            return None
        case "named":
            return NamedCall(tools.name)
        case "required":
            return JsonCalls()
    if parser is None:
        text = "`tools` needs a server that knows the model's format of calls: start it with --tool-call-parser."
        raise InvalidRequestError(text, param="tools")
    return TOOL_PARSERS[parser]()


def _marks_calls_by_special_tokens(tools: Tools, parser: str | None) -> bool:
    """Return whether calls are marked by special tokens, in the model's own format: then the text must show them."""
    return tools.mode == "auto" and parser is not None and TOOL_PARSERS[parser].has_special_marks
