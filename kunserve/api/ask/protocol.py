"""JSON of a generation request to typed values: what the client asked for, checked but not yet tokenized."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeGuard

from kunserve.api.ask.allowed_tools import with_allowed_tools
from kunserve.api.ask.declared.chat import Chat, ChatOptions
from kunserve.api.ask.declared.check import read
from kunserve.api.ask.declared.generation import Completion
from kunserve.api.ask.declared.values import MAX_USER_CHARS
from kunserve.api.ask.messages import read_messages
from kunserve.api.ask.structured import read_structure
from kunserve.api.ask.tools import Tools, read_tools
from kunserve.api.wire.backend import ApiSettings, ModelInfo
from kunserve.api.wire.fields import INT64_MAX, Fields, pieces, wrong_value
from kunserve.api.wire.grammars import Structure
from kunserve.errors import InvalidRequestError, NotFoundError
from kunserve.sampling import SamplingParams

# No vocabulary we know has a longer token (runs of blanks reach 128), so longer text is too long without
# tokenizing it: a 100 ms answer instead of seconds of a thread.
MAX_TOKEN_CHARS = 256
DEFAULT_COMPLETION_TOKENS = 16
TEMPLATE_FIELDS = ("messages", "tools", "add_generation_prompt")  # of a request, not of its template's arguments

Prompt = str | list[int]
Asked = Completion | ChatOptions


@dataclass(frozen=True, slots=True)
class GenerationCall:
    """What completions and chat have in common."""

    model: str
    params: SamplingParams  # its max_tokens: as asked, or the default, which `prompts.fit_to_context` cuts to what fits
    has_max_tokens: bool
    max_tokens_param: str  # the field that says it
    n: int
    is_stream: bool
    include_usage: bool
    continuous_usage: bool
    add_special_tokens: bool
    truncate_prompt_tokens: int | None  # keep so many tokens
    keeps_begin: bool  # of a prompt that is truncated; else its end is kept
    return_token_ids: bool
    priority: int
    request_id: str | None
    bad_words: tuple[str, ...]
    structure: Structure | None
    prompt_logprobs: int | None  # as asked for; params has more if `echo` needs more
    tokens_as_ids: bool  # log-probabilities name tokens by their ids
    user: str  # whom the client asks for; "": it does not say
    cache_salt: str  # its prefix is shared with requests of the same salt only


@dataclass(frozen=True, slots=True)
class CompletionCall:
    """POST /v1/completions."""

    generation: GenerationCall
    prompts: tuple[Prompt, ...]
    echo: bool
    is_echo_only: bool  # max_tokens is 0: the prompt and perhaps its log-probabilities are the answer


@dataclass(frozen=True, slots=True)
class ChatCall:
    """POST /v1/chat/completions."""

    generation: GenerationCall
    messages: list[dict[str, Any]]
    num_chars: int  # of all of them
    tools: Tools
    add_generation_prompt: bool
    continue_final_message: bool
    template_kwargs: dict[str, Any]


def read_model(name: str | None, model: ModelInfo) -> str:
    """Return the name under which the client knows the model; NotFoundError if it is another's."""
    if name is None:
        return model.name
    if name not in model.served_names:
        raise NotFoundError(f"The model `{name[:200]}` does not exist.", param="model")
    return name


def check_token_ids(ids: list[int], vocab_size: int, param: str) -> None:
    """Raise InvalidRequestError unless all of `ids` are in the vocabulary."""
    for piece in pieces(ids):
        for token_id in (min(piece), max(piece)):
            if not 0 <= token_id < vocab_size:
                text = f"`{param}` has token id {token_id}, out of the vocabulary of {vocab_size}."
                raise InvalidRequestError(text, param=param)


def check_text(text: Prompt, call: GenerationCall, max_model_len: int, param: str) -> None:
    """Refuse text (or ids) that cannot fit whatever its tokens are, before any work on it."""
    longest = max_model_len * MAX_TOKEN_CHARS if isinstance(text, str) else max_model_len
    if len(text) > longest and call.truncate_prompt_tokens is None:
        unit = "characters" if isinstance(text, str) else "tokens"
        raise too_long(f"the prompt has {len(text)} {unit}", param, max_model_len)


def too_long(what: str, param: str, max_model_len: int) -> InvalidRequestError:
    """Return the error for what does not fit the model."""
    return InvalidRequestError(f"This model's maximum context length is {max_model_len} tokens; {what}.", param=param)


def _read_logit_bias(biases: Mapping[str, float | None], vocab_size: int) -> tuple[tuple[int, float], ...]:
    values = [(int(key), float(bias)) for key, bias in biases.items() if bias is not None]
    check_token_ids([token_id for token_id, _ in values], vocab_size, "logit_bias")
    return tuple(values)


def read_params(
    asked: Asked, model: ModelInfo, max_tokens: int, num_logprobs: int | None, vocab_size: int
) -> SamplingParams:
    """Return how tokens are chosen, and when to stop."""
    vocab_size = min(vocab_size, model.vocab_size or vocab_size)
    for name in ("stop_token_ids", "allowed_token_ids"):
        check_token_ids(getattr(asked, name) or [], vocab_size, name)
    stop, allowed = model.stop if asked.stop is None else asked.stop, asked.allowed_token_ids
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=asked.min_tokens,
        temperature=asked.temperature,
        top_p=asked.top_p,
        top_k=max(asked.top_k, 0),  # -1 and 0 both mean off
        min_p=asked.min_p,
        seed=None if asked.seed is None else asked.seed & INT64_MAX,
        presence_penalty=asked.presence_penalty,
        frequency_penalty=asked.frequency_penalty,
        repetition_penalty=asked.repetition_penalty,
        logit_bias=_read_logit_bias(asked.logit_bias or {}, vocab_size),
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        stop_token_ids=frozenset(asked.stop_token_ids or ()),
        allowed_token_ids=None if allowed is None else tuple(dict.fromkeys(allowed)),
        num_prompt_logprobs=asked.prompt_logprobs,
        include_stop_str_in_output=asked.include_stop_str_in_output,
        ignore_eos=asked.ignore_eos,
        skip_special_tokens=asked.skip_special_tokens,
        num_logprobs=num_logprobs,
    )


def _check_restrictions(params: SamplingParams, structure: Structure | None) -> None:
    """Refuse a request one restriction of which leaves nothing of another."""
    if structure is not None and params.allowed_token_ids is not None:
        text = f"`{structure.param}` and `allowed_token_ids` exclude each other."
        raise InvalidRequestError(text, param="allowed_token_ids")


def _read_generation(
    asked: Asked,
    model: ModelInfo,
    params: SamplingParams,
    has_max_tokens: bool,
    add_special_tokens: bool,
) -> GenerationCall:
    if asked.stream and asked.prompt_logprobs is not None:
        raise InvalidRequestError("`prompt_logprobs` is not supported together with `stream`.", param="prompt_logprobs")
    if asked.best_of not in (None, 1, asked.n):
        raise InvalidRequestError("`best_of` is not supported unless it is 1 or equals `n`.", param="best_of")
    structure = read_structure(asked)
    _check_restrictions(params, structure)
    options = asked.stream_options
    include_usage = options is not None and bool(options.include_usage)
    return GenerationCall(
        model=read_model(asked.model, model),
        params=params,
        has_max_tokens=has_max_tokens,
        max_tokens_param="max_tokens" if asked.max_completion_tokens is None else "max_completion_tokens",
        n=asked.n,
        is_stream=asked.stream,
        include_usage=include_usage,
        continuous_usage=include_usage and options is not None and bool(options.continuous_usage_stats),
        add_special_tokens=add_special_tokens if asked.add_special_tokens is None else asked.add_special_tokens,
        truncate_prompt_tokens=_read_truncation(
            asked.truncate_prompt_tokens, model.max_model_len - (params.max_tokens if has_max_tokens else 1)
        ),
        keeps_begin=asked.truncation_side == "right",
        return_token_ids=asked.return_token_ids,
        priority=asked.priority,
        request_id=asked.request_id,
        bad_words=tuple(asked.bad_words or ()),
        structure=structure,
        prompt_logprobs=params.num_prompt_logprobs,
        tokens_as_ids=asked.return_tokens_as_token_ids,
        user=(asked.user if asked.safety_identifier is None else asked.safety_identifier)[:MAX_USER_CHARS],
        cache_salt=asked.cache_salt,
    )


def _read_truncation(kept: int | None, room: int) -> int | None:
    """Return how many tokens of the prompt to keep; -1 stands for as many as there is room for."""
    if kept == 0:
        wrong_value("truncate_prompt_tokens", "-1 or at least 1", kept)
    return max(room, 1) if kept == -1 else kept


def _max_tokens(asked: Asked) -> int | None:
    return asked.max_tokens if asked.max_completion_tokens is None else asked.max_completion_tokens


def read_completion(values: dict[str, Any], model: ModelInfo, settings: ApiSettings, vocab_size: int) -> CompletionCall:
    """Check the body of POST /v1/completions."""
    asked = read(values, Completion, model.sampling)
    wanted = _max_tokens(asked)
    if wanted == 0 and not asked.echo:
        name = "max_tokens" if asked.max_completion_tokens is None else "max_completion_tokens"
        wrong_value(name, "at least 1 (or 0 with `echo`)", wanted)
    default = model.max_tokens or DEFAULT_COMPLETION_TOKENS
    max_tokens = default if wanted is None else max(wanted, 1)  # the last prompt token computes one
    params = read_params(asked, model, max_tokens, asked.logprobs, vocab_size)
    generation = _read_generation(asked, model, params, wanted is not None, add_special_tokens=True)
    if asked.echo and asked.logprobs is not None:
        params = replace(params, num_prompt_logprobs=max(asked.logprobs, params.num_prompt_logprobs or 0))
        generation = replace(generation, params=params)
    prompts = _read_prompts(asked.prompt)
    if len(prompts) * generation.n > settings.max_sequences:
        text = f"`prompt` times `n` must be at most {settings.max_sequences} sequences."
        raise InvalidRequestError(text, param="prompt")
    for prompt in prompts:
        check_text(prompt, generation, model.max_model_len, "prompt")
        if isinstance(prompt, list):
            check_token_ids(prompt, model.vocab_size or vocab_size, "prompt")
    return CompletionCall(generation, prompts, asked.echo, is_echo_only=wanted == 0)


def _read_prompts(prompt: str | list[int] | list[str] | list[list[int]]) -> tuple[Prompt, ...]:
    """Return the prompts: a string and token ids are one, a list of either are several."""
    if isinstance(prompt, str) or _are_ids(prompt):
        return (prompt,)
    return tuple(each for each in prompt if not isinstance(each, int))


def _are_ids(prompt: list[int] | list[str] | list[list[int]]) -> TypeGuard[list[int]]:
    return isinstance(prompt[0], int)  # as the first, so all


def _read_template_kwargs(asked: ChatOptions, model: ModelInfo) -> dict[str, Any]:
    kwargs = asked.chat_template_kwargs or {}
    for name in TEMPLATE_FIELDS:
        if name in kwargs:
            text = f"`chat_template_kwargs` must not set `{name}`: it is a field of its own."
            raise InvalidRequestError(text, param="chat_template_kwargs")
    if asked.reasoning_effort is not None:
        kwargs = {"reasoning_effort": asked.reasoning_effort, **kwargs}
    return {**model.template_kwargs, **kwargs}


def read_chat(values: dict[str, Any], model: ModelInfo, vocab_size: int) -> ChatCall:
    """Check the body of POST /v1/chat/completions."""
    asked = read(values, Chat, model.sampling)
    return chat_call(asked, asked.messages, model, vocab_size)


def chat_call(asked: ChatOptions, given: list[dict[str, Any]], model: ModelInfo, vocab_size: int) -> ChatCall:
    """Check what fields say together, and the messages that were `given`."""
    wanted = _max_tokens(asked)
    if asked.top_logprobs and not asked.logprobs:
        raise InvalidRequestError("`top_logprobs` needs `logprobs` to be true.", param="top_logprobs")
    num_logprobs = (asked.top_logprobs or 0) if asked.logprobs else None
    params = read_params(asked, model, wanted or model.max_tokens or model.max_model_len, num_logprobs, vocab_size)
    generation = _read_generation(asked, model, params, wanted is not None, add_special_tokens=False)
    if asked.continue_final_message and asked.add_generation_prompt:
        text = "`continue_final_message` and `add_generation_prompt` exclude each other."
        raise InvalidRequestError(text, param="continue_final_message")
    if not asked.include_reasoning:
        text = "`include_reasoning` must be true: reasoning is always told apart, and may be left alone."
        raise InvalidRequestError(text, param="include_reasoning")
    choice = {"tools": asked.tools, "tool_choice": asked.tool_choice}
    tools = read_tools(Fields({**with_allowed_tools(choice), "parallel_tool_calls": asked.parallel_tool_calls}))
    if generation.structure is not None and tools.structure is not None:
        text = f"`{generation.structure.param}` and `tool_choice` exclude each other."
        raise InvalidRequestError(text, param="tool_choice")
    if len(given) > model.max_model_len:  # each takes a token at least
        raise too_long(f"there are {len(given)} messages", "messages", model.max_model_len)
    messages = read_messages(given)
    return ChatCall(
        generation=generation,
        messages=messages,
        num_chars=sum(len(message["content"]) for message in messages),
        tools=tools,
        add_generation_prompt=not asked.continue_final_message and asked.add_generation_prompt is not False,
        continue_final_message=asked.continue_final_message,
        template_kwargs=_read_template_kwargs(asked, model),
    )
