"""What HTTP needs from below: the engine, the tokenizer and the chat template, as small protocols."""

from __future__ import annotations

from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from kunserve.engine.request import Output, Request
from kunserve.engine.schedule.waiting import Waiting
from kunserve.engine.text.stream import Sink
from kunserve.errors import InvalidRequestError, KunServeError
from kunserve.observe.gauges import EngineStats
from kunserve.sampling import FinishReason


class TextTokenizer(Protocol):
    """Turns text into token ids and back. Called from several threads at once."""

    @property
    def vocab_size(self) -> int:
        """Return the size of the vocabulary: token ids are `0 <= id < vocab_size`."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return token ids of `text`, with the model's BOS and the like unless told otherwise."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Return text of `ids`; bytes that are no UTF-8 become U+FFFD."""

    def token_bytes(self, token_id: int) -> bytes:
        """Return what one token adds to a text, special tokens included: perhaps a part of a character."""

    def token_text(self, token_id: int) -> str:
        """Return text of one token on its own, special tokens included; half a character is U+FFFD."""

    def shown_bytes(self, token_id: int, skip_special_tokens: bool = True) -> bytes:
        """Return what a token adds to an answer: its `token_bytes`, but nothing if it is special and skipped."""

    @property
    def strips_space(self) -> bool:
        """Return whether the first blank of a text is the tokenizer's own, and not part of it."""


@dataclass(frozen=True, slots=True)
class TokenIdsOnly:
    """Stands in for the tokenizer of a model that has none: clients send and get token ids."""

    vocab_size: int

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Raise InvalidRequestError, always."""
        raise InvalidRequestError("The model has no tokenizer: send token ids.", param="prompt")

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Return no text."""
        return ""

    def token_bytes(self, token_id: int) -> bytes:
        """Return a name for the token."""
        return self.token_text(token_id).encode()

    def token_text(self, token_id: int) -> str:
        """Return a name for the token."""
        return f"token_id:{token_id}"

    def shown_bytes(self, token_id: int, skip_special_tokens: bool = True) -> bytes:
        """Return no text."""
        return b""

    @property
    def strips_space(self) -> bool:
        """Return False: there is no text that a blank could be stripped from."""
        return False


class Template(Protocol):
    """The model's chat template."""

    def render(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **kwargs: Any,
    ) -> str:
        """Return the prompt of a conversation; raises InvalidRequestError when the template refuses it."""


class Counters(Protocol):
    """What HTTP counts for `/metrics`."""

    def rejection(self, reason: str) -> None:
        """Count one request turned away; `reason` is one of `metrics.REJECTIONS`."""

    def body_bytes(self, num_bytes: int) -> None:
        """Show how many bytes of bodies are held that are no requests yet."""

    def choices_asked(self, n: int) -> None:
        """Count the `n` of one prompt."""


class Generator(Protocol):
    """The engine as routes of clients see it, in this process or in another one."""

    def submit_to(self, request: Request, sink: Sink) -> Awaitable[KunServeError | None] | None:
        """Queue a request. `sink` gets deltas up to and including the one with a finish_reason, or an error.

        Raises OverloadedError and the like, or returns what says later whether there is such an error.
        """

    async def replay(self, request: Request, token_ids: Sequence[int]) -> Output:
        """Bring a new request to where another server has left it; return what these tokens say, in one piece.

        If that has a finish reason, the request is over. Raises InvalidRequestError for tokens that it cannot have.
        """

    def abort(self, request_id: str, reason: FinishReason = FinishReason.ABORT) -> None:
        """End a request and free its blocks within one step; no effect if it has ended or is unknown."""


class Backend(Generator, Protocol):
    """The engine as operators see it, too."""

    @property
    def is_ready(self) -> bool:
        """Return True once the model is loaded, until the server begins to stop."""

    def waiting(self, owner: str | None = None) -> Waiting:
        """Return how much is queued, of all owners or of one."""

    def stats(self) -> EngineStats:
        """Return numbers for `/metrics`; never waits."""

    def state(self, num_transitions: int | None = None) -> dict[str, Any]:
        """Return everything worth seeing for `/kunserve/state`, as JSON types; the last `num_transitions`, or all."""

    async def drop(self, group_ids: Sequence[int] | None, *, is_forced: bool = False) -> dict[str, Any]:
        """Merge these groups, or the two smallest; return the transition as JSON types, once its epoch is committed.

        `is_forced`: even if live requests are computed again for it.
        """

    async def restore(self, group_ids: Sequence[int] | None) -> dict[str, Any]:
        """Split these groups, or the largest; return the transition as JSON types, once its epoch is committed."""

    async def remove_device(self, index: int, drain_s: float) -> dict[str, Any]:
        """Take a device out once its requests have ended, or after `drain_s`; return the transition as JSON types.

        Raises ConflictError if that cannot be done now.
        """

    async def add_device(self, index: int) -> dict[str, Any]:
        """Take a device in that was removed or lost; return the transition as JSON types. Raises as `remove_device`."""

    def health(self) -> str | None:
        """Return why steps make no progress; None while they do."""

    def degraded(self) -> str | None:
        """Return which devices do not do their work, in words; None if all do but those that were taken out."""


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """The one model that is served. The first name is the one it calls itself."""

    served_names: tuple[str, ...]
    max_model_len: int  # tokens, prompt and output together
    root: str
    created: int  # seconds since 1970
    sampling: Mapping[str, Any] = field(default_factory=dict)  # of requests that do not say (defaults.py)
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)  # likewise, for the chat template
    tokenizer: Mapping[str, Any] = field(default_factory=dict)  # its special tokens and the chat template's source
    vocab_size: int | None = None  # token ids that the model has numbers for; None: those of its tokenizer
    max_tokens: int | None = None  # of answers to requests that do not say; None: as the route has it
    stop: str | tuple[str, ...] = ()  # likewise: texts that end an answer

    @property
    def name(self) -> str:
        """Return the name of answers to requests that name none."""
        return self.served_names[0]


@dataclass(frozen=True, slots=True)
class ApiSettings:
    """Bounds of what one client can ask of the server.

    8 MiB are a million token ids; one text may have less (prompts.MAX_TEXT_CHARS).
    """

    max_body_bytes: int = 8 << 20
    max_body_memory_bytes: int = 512 << 20  # of all bodies that are no requests yet
    max_response_bytes: int = 64 << 20  # of stored responses; 0: none is stored
    response_file: Path | None = None  # where they are kept beyond the life of the server
    body_timeout_s: float = 60.0  # from the headers to the body's last byte
    idle_timeout_s: float = 75.0  # for a connection to come up with (all) the headers of its next request
    write_timeout_s: float = 30.0  # without one byte taken by the client
    max_sequences: int = 2048  # prompts times n of one request
    tokenizer_threads: int = 2
    api_keys: tuple[str, ...] = ()  # none: everybody may come in
    admin_keys: tuple[str, ...] = ()  # none: nobody is an admin
    front_keys: tuple[str, ...] = ()  # none: there is no front that resumes streams of other servers here
    allowed_origins: tuple[str, ...] = ()  # of browsers; "*" is any
    max_num_queued_reqs: int = 1024  # sequences waiting, accepted ones included
    max_num_queued_tokens: int = 4 << 20  # of their prompts: 64 MiB of them
    shares_prefixes: bool = False  # with several API keys: one key's requests find the prefixes of others
    uses_priority: bool = False  # requests may say theirs (`--scheduling-policy priority`)
    logs_access: bool = True
    tool_call_parser: str | None = None  # see say.calls.formats.TOOL_FORMATS
    reasoning_parser: str | None = None  # see say.reasoning.REASONING_FORMATS
    inline_chars: int = 2048  # text up to this size is tokenized on the event loop: about 1 ms

    @property
    def largest_body_bytes(self) -> int:
        """Return the largest body that can ever be read: one alone may have three quarters of the memory for bodies."""
        return min(self.max_body_bytes, self.max_body_memory_bytes * 3 // 4)
