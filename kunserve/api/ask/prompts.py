"""Prompts to token ids that fit the model: chat template, tokenizer, truncation, length and range checks."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from kunserve.api.ask.protocol import ChatCall, GenerationCall, Prompt, check_text, check_token_ids, too_long
from kunserve.api.wire.backend import Template
from kunserve.api.wire.context import Api
from kunserve.errors import InvalidRequestError
from kunserve.sampling import SamplingParams

CALL_CHARS = 64  # a call or a message costs as much as so many characters
# Of one text; a model with a long context takes more. Half a million tokens are made into Python's numbers in one
# piece, in which no other thread runs: 15 ms.
MAX_TEXT_CHARS = 1 << 20
CHARS_OF_A_TOKEN = 8  # more than any language has on average
ENDING_CHARS = 64  # enough to see whether the template has opened or closed the reasoning


def _encode(api: Api, text: str, add_special_tokens: bool, param: str) -> list[int]:
    most = max(MAX_TEXT_CHARS, CHARS_OF_A_TOKEN * api.model.max_model_len)
    if len(text) > most:
        message = f"A text of {len(text)} characters is not tokenized; at most {most} are."
        raise InvalidRequestError(message, param=param)
    return api.tokenizer.encode(text, add_special_tokens)


async def tokenize(api: Api, prompts: Sequence[Prompt], add_special_tokens: bool) -> list[list[int]]:
    """Return token ids of each prompt; those that are ids already stay as they are."""

    def encode(prompt: Prompt) -> list[int]:
        return _encode(api, prompt, add_special_tokens, "prompt") if isinstance(prompt, str) else prompt

    num_chars = sum(len(prompt) + CALL_CHARS for prompt in prompts if isinstance(prompt, str))
    return await api.offload(num_chars, lambda: [encode(prompt) for prompt in prompts])


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """A conversation as the model sees it."""

    ids: list[int]
    ending: str  # the last characters of its text


async def tokenize_chat(api: Api, call: ChatCall) -> ChatPrompt:
    """Return a conversation's prompt. The template writes special tokens itself: none are added by default."""
    template = api.chat_template
    if template is None:
        raise InvalidRequestError("The model has no chat template: use /v1/completions.", param="messages")

    def encode() -> ChatPrompt:
        text = _continued(template, call) if call.continue_final_message else _render(template, call, call.messages)
        check_text(text, call.generation, api.model.max_model_len, "messages")
        ids = _encode(api, text, call.generation.add_special_tokens, "messages")
        return ChatPrompt(ids, text[-ENDING_CHARS:])

    num_chars = call.num_chars + CALL_CHARS * len(call.messages)
    if call.tools.definitions:
        return await api.on_thread(encode)  # of any size
    return await api.offload(num_chars, encode)


def _render(template: Template, call: ChatCall, messages: list[dict[str, Any]]) -> str:
    return template.render(messages, call.tools.definitions or None, call.add_generation_prompt, **call.template_kwargs)


def _continued(template: Template, call: ChatCall) -> str:
    """Return the prompt up to the last character of the final message, without what the template closes it with.

    A mark behind the message tells where that is. Looked for as text, a short message would be found in what the
    template writes after it, and templates may cut off the blanks that a message ends with.
    """
    *before, final = call.messages
    if final.get("tool_calls"):
        message = "`continue_final_message` needs a final message without tool calls: they end it."
        raise InvalidRequestError(message, param="continue_final_message")
    mark = f"END{random.getrandbits(128):032x}"  # nobody's text has it
    text, found, _ = _render(template, call, [*before, {**final, "content": final["content"] + mark}]).rpartition(mark)
    if not found:
        message = "`continue_final_message` needs a chat template that shows the final message as it is."
        raise InvalidRequestError(message, param="continue_final_message")
    return text


def fit_to_context(
    ids: list[int], call: GenerationCall, bad_words: tuple[tuple[int, ...], ...], api: Api, param: str
) -> tuple[list[int], SamplingParams]:
    """Return the tokens to compute, and how many may follow.

    Raises InvalidRequestError if prompt and max_tokens together exceed the model, or if its tokenizer has made a token
    of the text that the model has no row for.
    """
    max_model_len = api.model.max_model_len
    if call.truncate_prompt_tokens is not None:
        kept = call.truncate_prompt_tokens
        ids = ids[:kept] if call.keeps_begin else ids[-kept:]
    if not ids:
        raise InvalidRequestError("The prompt is empty: it has no tokens.", param=param)
    if api.model.vocab_size is not None:
        check_token_ids(ids, api.model.vocab_size, param)
    room = max_model_len - len(ids)
    if room < 1:
        raise too_long(f"the prompt has {len(ids)} and needs room for one more", param, max_model_len)
    max_tokens = call.params.max_tokens
    if max_tokens > room and call.has_max_tokens:
        what = f"the prompt has {len(ids)} and `{call.max_tokens_param}` asks for {max_tokens} more"
        raise too_long(what, call.max_tokens_param, max_model_len)
    max_tokens = min(max_tokens, room)
    if call.params.min_tokens > max_tokens:
        text = f"`min_tokens` must be at most the {max_tokens} tokens that may be generated."
        raise InvalidRequestError(text, param="min_tokens")
    if (max_tokens, bad_words) == (call.params.max_tokens, call.params.bad_words):
        return ids, call.params  # nearly always, and a request may have a thousand prompts
    return ids, replace(call.params, max_tokens=max_tokens, bad_words=bad_words)


async def tokenize_bad_words(api: Api, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """Return token sequences of words: at the beginning of a text, and after a blank.

    A word with a token that the model has no number for is never written.
    """
    highest = api.model.vocab_size or api.tokenizer.vocab_size
    texts = [blank + word.lstrip() for word in words for blank in ("", " ")]
    spelt = await tokenize(api, texts, add_special_tokens=False)
    return tuple(dict.fromkeys(tuple(ids) for ids in spelt if ids and max(ids) < highest))
