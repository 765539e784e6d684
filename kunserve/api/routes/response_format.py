"""The `response` object of /v1/responses: what it says of its request, its items, and the events that build it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from kunserve.api.ask.protocol import GenerationCall
from kunserve.api.say.answers import Choice
from kunserve.api.say.deltas import Text
from kunserve.api.say.parts import AnswerPart, PartStream, deltas_of_output, named_event, was_cut
from kunserve.api.say.reasoning_tokens import ReasoningTokens
from kunserve.api.say.token_logprobs import token_logprobs
from kunserve.api.wire.backend import TextTokenizer
from kunserve.api.wire.naming import FieldNames
from kunserve.engine.request import Output
from kunserve.errors import KunServeError


class ResponseParts(PartStream):
    """Items of `output` and their events, numbered."""

    def __init__(self, response_id: str) -> None:
        super().__init__()
        self.waiting_logprobs: list[Any] = []  # of tokens whose text is still to come
        self._response_id, self._number = response_id, 0

    def event(self, name: str, /, **values: Any) -> bytes:
        """Return the next event."""
        self._number += 1
        return named_event(name, {"sequence_number": self._number - 1, **values})

    def _location(self, part: AnswerPart) -> dict[str, Any]:
        return {"item_id": self.item(part)["id"], "output_index": part.index}

    def item(self, part: AnswerPart, status: str = "") -> dict[str, Any]:
        """Return a part as an item of `output`."""
        status = status or ("incomplete" if part.is_cut else "completed")
        number = f"{self._response_id.removeprefix('resp_')}_{part.index}"
        match part.kind:
            case "text":
                content = [_text_part(part)] if part.text else []
                shown = {"type": "message", "role": "assistant", "content": content}
                return {"id": f"msg_{number}", "status": status, **shown}
            case "reasoning":
                content = [_text_part(part)] if part.text else []
                return {"id": f"rs_{number}", "type": "reasoning", "summary": [], "content": content, "status": status}
        call = {"call_id": part.call_id, "name": part.name, "arguments": part.text}
        return {"id": f"fc_{number}", "type": "function_call", "status": status, **call}

    def begin(self, part: AnswerPart) -> bytes:
        """See `PartStream`."""
        added = self.event("response.output_item.added", output_index=part.index, item=self.item(part, "in_progress"))
        if part.kind == "call":
            return added
        location = {**self._location(part), "content_index": 0}
        return added + self.event("response.content_part.added", **location, part=_text_part(part))

    def more(self, part: AnswerPart, text: str) -> bytes:
        """See `PartStream`."""
        location = self._location(part)
        logprobs, self.waiting_logprobs = self.waiting_logprobs, []  # other parts tell none
        match part.kind:
            case "text":
                part.logprobs += logprobs
                told = {"delta": text, "logprobs": logprobs}
                return self.event("response.output_text.delta", **location, content_index=0, **told)
            case "reasoning":
                return self.event("response.reasoning_text.delta", **location, content_index=0, delta=text)
        return self.event("response.function_call_arguments.delta", **location, delta=text)

    def end(self, part: AnswerPart) -> bytes:
        """See `PartStream`."""
        location = self._location(part)
        match part.kind:
            case "text":
                told = {"text": part.text, "logprobs": part.logprobs}
                done = self.event("response.output_text.done", **location, content_index=0, **told)
            case "reasoning":
                done = self.event("response.reasoning_text.done", **location, content_index=0, text=part.text)
            case "call":
                name = "response.function_call_arguments.done"
                done = self.event(name, **location, name=part.name, arguments=part.text)
        if part.kind != "call":
            done += self.event("response.content_part.done", **location, content_index=0, part=_text_part(part))
        return done + self.event("response.output_item.done", output_index=part.index, item=self.item(part))


def _text_part(part: AnswerPart) -> dict[str, Any]:
    if part.kind == "reasoning":
        return {"type": "reasoning_text", "text": part.text}
    return {"type": "output_text", "text": part.text, "annotations": [], "logprobs": part.logprobs}


class ResponseFormat:
    """OpenAI's `response` object and the events that build it. An `AnswerWriter` for one choice."""

    def __init__(
        self,
        response_id: str,
        created: int,
        call: GenerationCall,
        values: dict[str, Any],
        names: FieldNames,
        tokenizer: TextTokenizer,
        store: Callable[[dict[str, Any]], None] | None,
    ) -> None:
        """Begin a response. `values`: the body of the request; errors are told in its words, `names`.

        `store` is given the response before its client has all of it; None: it is not kept.
        """
        self.call = call
        self._names, self._tokenizer, self._store = names, tokenizer, store
        self._parts = ResponseParts(response_id)
        self._last = Output()
        self._reasoning: ReasoningTokens | None = None  # as far as log-probabilities have come
        self._has_logprobs = self.call.params.num_logprobs is not None
        self._constant = {
            "id": response_id,
            "object": "response",
            "created_at": created,
            "model": self.call.model,
            **_echoed(values),
            "temperature": self.call.params.temperature,
            "top_p": self.call.params.top_p,
            "presence_penalty": self.call.params.presence_penalty,
            "frequency_penalty": self.call.params.frequency_penalty,
            "store": store is not None,
            "background": False,
        }

    def _response(
        self, status: str, choice: Choice | None = None, error: KunServeError | None = None
    ) -> dict[str, Any]:
        usage = None
        if choice is not None:
            num_prompt = choice.request.num_prompt_tokens
            usage = {
                "input_tokens": num_prompt,
                "input_tokens_details": {"cached_tokens": choice.request.num_cached_tokens},
                "output_tokens": choice.num_tokens,
                "output_tokens_details": {"reasoning_tokens": choice.num_reasoning_tokens},
                "total_tokens": num_prompt + choice.num_tokens,
            }
        return {
            **self._constant,
            "status": status,
            "completed_at": int(time.time()) if status == "completed" else None,
            "error": None if error is None else {"code": "server_error", "message": error.message},
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "output": [self._parts.item(part) for part in self._parts.parts] if usage else [],
            "usage": usage,
        }

    def _finished(self, choice: Choice, last: Output) -> dict[str, Any]:
        response = self._response(_status(last), choice)
        if self._store is not None:
            self._store(response)
        return response

    def opening(self, choice: Choice, output: Output) -> bytes:
        """See `AnswerWriter`."""
        response = self._response("in_progress")
        event = self._parts.event
        return event("response.created", response=response) + event("response.in_progress", response=response)

    def chunk(self, choice: Choice, output: Output) -> bytes:
        """See `AnswerWriter`."""
        self._last = output
        self._wait(choice, output)
        return self._parts.push(deltas_of_output(choice, output))

    def _wait(self, choice: Choice, output: Output) -> None:
        """Keep log-probabilities until their text comes; reasoning has none."""
        if not self._has_logprobs:
            return
        waiting = self._parts.waiting_logprobs
        waiting += token_logprobs(self._tokenizer, self._tokenizer.token_text, output.logprobs)
        if choice.reasoning is None:
            return
        if self._reasoning is None:
            self._reasoning = choice.reasoning.fresh()
        num_before = self._reasoning.num_tokens
        self._reasoning.take(output.token_ids)
        del waiting[: self._reasoning.num_tokens - num_before]

    def ending(self, choices: Sequence[Choice]) -> bytes:
        """See `AnswerWriter`."""
        closed = self._parts.close(is_cut=was_cut(self._last))
        response = self._finished(choices[0], self._last)
        return closed + self._parts.event(f"response.{response['status']}", response=response)

    def error(self, error: KunServeError) -> bytes:
        """See `AnswerWriter`."""
        event, error = self._parts.event, self._names.reworded(error)
        details = {"code": str(error.status), "message": error.message, "param": error.param}
        return event("error", **details) + event("response.failed", response=self._response("failed", error=error))

    def answer_json(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """See `AnswerWriter`."""
        [choice] = choices
        last = choice.outputs[-1]
        if choice.parser is None:
            self._wait(choice, last._replace(logprobs=tuple(choice.logprobs)))
            self._parts.push([Text(choice.text)])
        else:  # one after the other, to know which tokens are the text's
            for output in choice.outputs:
                self.chunk(choice, output)
        self._parts.close(is_cut=was_cut(last))
        return self._finished(choice, last)


def _echoed(values: dict[str, Any]) -> dict[str, Any]:
    """Return what a response repeats of its request, with what is so where it does not say."""
    names = ("instructions", "max_output_tokens", "max_tool_calls", "user", "previous_response_id")
    texts = ("safety_identifier", "prompt_cache_key")
    text_format = (values.get("text") or {}).get("format") or {"type": "text"}
    if text_format.get("type") == "json_schema":
        text_format = {"name": None, "description": None, "strict": None, **text_format}
    reasoning = values.get("reasoning") or {}
    return {
        **{name: values.get(name) for name in (*names, *texts)},
        "metadata": values.get("metadata") or {},
        "tools": [_tool(tool) for tool in values.get("tools") or []],
        "tool_choice": values.get("tool_choice") or "auto",
        "parallel_tool_calls": values.get("parallel_tool_calls") is not False,
        "text": {**(values.get("text") or {}), "format": text_format},
        "reasoning": {"effort": reasoning.get("effort"), "summary": reasoning.get("summary")},
        "top_logprobs": values.get("top_logprobs") or 0,
        "truncation": values.get("truncation") or "disabled",
        "service_tier": "default",
    }


def _tool(tool: dict[str, Any]) -> dict[str, Any]:
    if "function" in tool:  # as chat writes it
        tool = {"type": "function", **tool["function"]}
    return {"description": None, "parameters": None, "strict": None, **tool}


def _status(last: Output) -> str:
    return "incomplete" if was_cut(last) else "completed"
