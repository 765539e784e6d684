"""The bodies of routes that generate nothing for a client: /detokenize, and those of operators."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

from kunserve.api.ask.declared.values import AtLeastOne, Count, NonEmpty, Object, TokenId
from kunserve.api.wire.fields import INT64_MAX

MAX_REQUESTS = 1000
MAX_RATE = 1000.0

GroupId = Annotated[int, Meta(ge=0, le=INT64_MAX, description="a group id")]


class Detokenize(Struct, kw_only=True):
    """Declares the body of POST /detokenize."""

    tokens: list[TokenId]
    model: str | None = None


class Burst(Struct, kw_only=True):
    """Declares the body of POST /kunserve/burst."""

    requests: Annotated[int, Meta(ge=1, le=MAX_REQUESTS)] = 48
    rate: Annotated[float, Meta(ge=0.01, le=MAX_RATE)] = 16.0  # requests per second, Poisson arrivals
    prompt_tokens: AtLeastOne | None = None
    output_tokens: AtLeastOne | None = None


class Resume(Struct, kw_only=True):
    """Declares the body of POST /kunserve/resume."""

    path: NonEmpty  # of the request that another server has begun to answer
    body: Object  # of that request
    token_ids: list[list[TokenId]]  # of each choice: the tokens that the client has been told of
    num_cached_tokens: list[Count]  # of each choice: tokens of the prompt that were cached, as the other server said


class Groups(Struct, kw_only=True):
    """Declares the body of POST /kunserve/restore."""

    groups: list[GroupId] | None = None


class Remove(Struct, kw_only=True):
    """Declares the body of POST /kunserve/devices/{index}/remove."""

    drain_s: Annotated[float, Meta(ge=0)] = 30.0  # time that requests on it have to end, before they go on elsewhere


class Drop(Groups, kw_only=True):
    """Declares the body of POST /kunserve/drop."""

    force: bool = False  # drop even where the KV of live requests cannot follow, so that they are computed again
