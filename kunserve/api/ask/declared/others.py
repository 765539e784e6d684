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
    """POST /detokenize."""

    tokens: list[TokenId]
    model: str | None = None


class Burst(Struct, kw_only=True):
    """POST /kunserve/burst."""

    requests: Annotated[int, Meta(ge=1, le=MAX_REQUESTS)] = 48
    rate: Annotated[float, Meta(ge=0.01, le=MAX_RATE)] = 16.0  # requests per second, Poisson arrivals
    prompt_tokens: AtLeastOne | None = None
    output_tokens: AtLeastOne | None = None


class Resume(Struct, kw_only=True):
    """POST /kunserve/resume."""

    path: NonEmpty  # of the request that another server has begun to answer
    body: Object  # of that request
    token_ids: list[list[TokenId]]  # that its client has been told of, choice by choice
    num_cached_tokens: list[Count]  # of each choice, as that server said


class Groups(Struct, kw_only=True):
    """POST /kunserve/restore."""

    groups: list[GroupId] | None = None


class Remove(Struct, kw_only=True):
    """POST /kunserve/devices/{index}/remove."""

    drain_s: Annotated[float, Meta(ge=0)] = 30.0  # for its requests to end before they go on elsewhere


class Drop(Groups, kw_only=True):
    """POST /kunserve/drop."""

    force: bool = False  # even if the KV of live requests cannot follow, and they are computed again
