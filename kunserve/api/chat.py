"""POST /v1/chat/completions: a conversation through the model's chat template, answered as a message."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from aiohttp import web

from kunserve.api.answering import answer, make_choices
from kunserve.api.answers import AnswerFormat, Choice
from kunserve.api.context import API, choose_request_id, read_json
from kunserve.api.prompts import fit, tokenize_chat
from kunserve.api.protocol import read_chat
from kunserve.engine.request import TokenLogprobs


class ChatFormat(AnswerFormat):
    """OpenAI's `chat.completion` and `chat.completion.chunk`."""

    object = "chat.completion"
    chunk_object = "chat.completion.chunk"
    text_open = b',"delta":{"content":'
    text_close = b"}"

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        text = self.token_text(token_id)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

    def logprobs_json(self, entries: Sequence[TokenLogprobs], text_offset: int) -> dict[str, Any]:
        """One object per token, with as many of the most likely ones as asked for."""
        content = [
            {**self._token(entry.token_id, entry.logprob), "top_logprobs": [self._token(*t) for t in entry.top]}
            for entry in entries
        ]
        return {"content": content}

    def opening(self, choice: Choice) -> bytes:
        """The role, and the prompt's token ids once."""
        delta = {"role": "assistant", "content": ""}
        first = {"index": choice.index, "delta": delta, "logprobs": None, "finish_reason": None}
        if self.call.return_token_ids:
            return self.event([first], prompt_token_ids=choice.request.prompt_token_ids)
        return self.event([first])

    def choice_json(self, choice: Choice) -> dict[str, Any]:
        """The message, its log-probabilities, and the token ids if asked for."""
        asked = self.call.params.num_logprobs is not None
        logprobs = self.logprobs_json(choice.logprobs, 0) if asked else None
        ids = {"token_ids": choice.token_ids} if self.call.return_token_ids else {}
        return {"message": {"role": "assistant", "content": choice.text}, "logprobs": logprobs, **ids}

    def answer_json(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """The answer in one piece; all choices have the same prompt."""
        whole = super().answer_json(choices)
        if self.call.return_token_ids:
            whole["prompt_token_ids"] = choices[0].request.prompt_token_ids
        return whole


async def chat_completions(request: web.Request) -> web.StreamResponse:
    """The route."""
    api = request.app[API]
    call = read_chat(await read_json(request, api.settings), api.model, api.tokenizer.vocab_size)
    generation = call.generation
    ids, params = fit(await tokenize_chat(api, call), generation, api, "messages")
    answer_id = f"chatcmpl-{choose_request_id(request, generation.request_id)}"
    form = ChatFormat(answer_id, int(time.time()), generation, api.tokenizer)
    return await answer(request, api, form, make_choices(api, answer_id, generation, [(ids, params, "")]))
