"""Make a chat request ready for the engine, for all chat endpoints: prompt, structure, and how its output is read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from aiohttp import web

from kunserve.api.ask.prompts import ChatPrompt, fit_to_context, tokenize_bad_words, tokenize_chat
from kunserve.api.ask.protocol import ChatCall
from kunserve.api.ask.structured import compile_structure
from kunserve.api.ask.tools import Tools
from kunserve.api.say.answering import answer, make_choices
from kunserve.api.say.answers import AnswerWriter
from kunserve.api.say.calls.formats import BARE, HARMONY, TOOL_FORMATS, CallFormat
from kunserve.api.say.calls.harmony import Channels
from kunserve.api.say.calls.parser import CallsParser, NamedCall, ToolParser
from kunserve.api.say.reasoning import ANALYSIS, REASONING_FORMATS, MessageParser, ReasoningFormat, ThinkSplitter
from kunserve.api.say.reasoning_tokens import ReasoningTokens
from kunserve.api.wire.access import owner_of
from kunserve.api.wire.admission import CHARS_PER_TOKEN
from kunserve.api.wire.context import Api
from kunserve.api.wire.grammars import Begun
from kunserve.errors import InvalidRequestError
from kunserve.sampling import SamplingParams


@dataclass(frozen=True, slots=True)
class Conversation:
    """A chat as the engine gets it, and how its answer is read."""

    ids: list[int]
    params: SamplingParams
    constraint: Begun | None
    new_parser: Callable[[], MessageParser] | None  # makes one for each choice; None: the text is the message
    reasoning: ReasoningTokens | None  # counts them; None if none can come


async def answer_chat(
    request: web.Request, api: Api, call: ChatCall, writer: AnswerWriter, answer_id: str
) -> web.StreamResponse:
    """Answer a conversation in the format of the endpoint that `writer` writes for."""
    generation, owner = call.generation, owner_of(request, call.generation.user)
    num_tokens = call.num_chars // CHARS_PER_TOKEN + len(call.messages)
    async with api.admission.accepted(owner, generation.n, num_tokens * generation.n) as reservation:
        prepared = await prepare(request, api, call)
        prompts = [(prepared.ids, prepared.params, None)]
        parsing = (prepared.new_parser, prepared.reasoning)
        choices = await make_choices(api, answer_id, generation, owner, prompts, prepared.constraint, *parsing)
        return await answer(request, api, writer, choices, reservation)


async def prepare(request: web.Request, api: Api, call: ChatCall) -> Conversation:
    """Render and tokenize a chat, and compile its structure. Raises KunServeError for what its client must mend."""
    calls = _call_format(call.tools, api.settings.tool_call_parser)  # refuse before any work
    prompt = await tokenize_chat(api, call)
    thoughts = REASONING_FORMATS.get(api.settings.reasoning_parser or "")
    reasons = None if thoughts is None else _reasons(thoughts, prompt, call)
    structure = call.generation.structure or call.tools.structure
    constraint = await compile_structure(request, api, structure, call.generation.user, reasons is not None)
    bad_words = await tokenize_bad_words(api, call.generation.bad_words)
    ids, params = fit_to_context(prompt.ids, call.generation, bad_words, api, "messages")
    has_channels = ANALYSIS is thoughts or HARMONY is calls
    if has_channels or _marks_by_special_tokens(call.tools, calls, None if reasons is None else thoughts):
        params = replace(params, skip_special_tokens=False)

    def new_parser() -> MessageParser:
        if has_channels:
            return MessageParser(None, _channels_parser(call.tools, calls, reasons is True), call.tools.is_parallel)
        think = None if reasons is None or thoughts is None else ThinkSplitter(reasons, thoughts)
        return MessageParser(think, _tool_parser(call.tools, calls), call.tools.is_parallel)

    needs_parser = has_channels or reasons is not None or call.tools.mode != "none"
    counter = None if reasons is None or thoughts is None else ReasoningTokens(api.tokenizer, reasons, thoughts)
    return Conversation(ids, params, constraint, new_parser if needs_parser else None, counter)


def _reasons(thoughts: ReasoningFormat, prompt: ChatPrompt, call: ChatCall) -> bool | None:
    """Return whether the prompt has begun a reasoning already; None where the answer can have none.

    It can have none if the template has closed the reasoning already (Qwen3 without thinking), or if it goes on with a
    message whose reasoning is over.
    """
    ending = prompt.ending.rstrip()
    if ending.endswith(thoughts.ends):
        return None
    if call.continue_final_message and (begun := call.messages[-1]["content"]).strip():
        return True if _last(begun, thoughts.starts) > _last(begun, thoughts.ends) else None
    return thoughts.is_open or ending.endswith(thoughts.starts)


def _last(text: str, marks: tuple[str, ...]) -> int:
    return max(text.rfind(mark) for mark in marks)


def _call_format(tools: Tools, parser: str | None) -> CallFormat | None:
    """Return the model's own format of calls. Raises InvalidRequestError if it is needed, and not known."""
    if tools.mode == "auto" and parser is None:
        text = "`tools` needs a server that knows the model's format of calls: start it with --tool-call-parser."
        raise InvalidRequestError(text, param="tools")
    return None if parser is None else TOOL_FORMATS[parser]


def _tool_parser(tools: Tools, calls: CallFormat | None) -> ToolParser | None:
    """Return what takes calls out of one choice's text: in the model's own format, or as `Tools.structure` forces it.

    The ids of calls are written as the model's own are in either case: templates may refuse others.
    """
    new_id = (calls or BARE).new_id
    match tools.mode:
        case "none":
            return None
        case "named":
            return NamedCall(tools.name, new_id)
        case "required":
            return CallsParser(replace(BARE, new_id=new_id), tools.definitions)
    assert calls is not None
    return CallsParser(calls, tools.definitions)


def _channels_parser(tools: Tools, calls: CallFormat | None, is_open: bool) -> ToolParser | None:
    """Return what `_tool_parser` does for a model that writes harmony, which tells reasoning and answer apart, too."""
    if tools.mode in ("named", "required"):  # the structure leaves no room for channels
        return _tool_parser(tools, calls)
    return Channels(tools.definitions, is_open, reads_calls=tools.mode == "auto")


def _marks_by_special_tokens(tools: Tools, calls: CallFormat | None, thoughts: ReasoningFormat | None) -> bool:
    """Return whether special tokens mark calls or reasoning in the model's own format: the text must show them then."""
    has_calls = tools.mode == "auto" and calls is not None and calls.has_special_marks
    return has_calls or (thoughts is not None and thoughts.has_special_marks)
