"""Write docs/sizing.md: what GPUs hold of a model, what a drop gains there, and what a chain costs in time per token.

All figures come from what `kunserve plan` uses itself: the launch's placement, the planner's largest drop, and the cost
model with the rates of data sheets (models/costs/devices.toml). Nothing here was measured on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from markdown_tables import table

from kunserve.errors import ConfigError
from kunserve.model.card import list_cards, load_card
from kunserve.model.config import ModelConfig
from kunserve.planner.cost import CostModel, TokenSpan, Work
from kunserve.sim.cluster import USABLE, Instances, parse_cluster
from kunserve.sim.machine import DTYPE, SimMachine, kv_dtype_on_gpus
from kunserve.sim.plan.capacity import Capacity, Lengths, RequestRates
from kunserve.sim.workload import WORKLOADS

BLOCK_SIZE = 16
GPUS = ("4090", "L40S", "A100-40", "A100-80", "H100", "H200", "B200")
COUNTS = (2, 4, 8)
CHAINS = (1, 2, 4, 8)
RATED_GPUS = ("A100-40", "A100-80", "H100")
TIMED_GPUS = ("A100-80", "H100")
CONTEXT = 1024  # tokens that each request of the time tables holds
SHARED_LOAD = "sharegpt"
NUM_REQUESTS = (1, 32, 256)  # that are decoded together on all GPUs of a row

INTRODUCTION = f"""\
# Sizing

What a model needs, what a drop gains, and what a chain costs. Made by `scripts/docs/make_pages.py` from what
`kunserve plan` computes with: the placement of a launch, the planner's largest drop, and the cost model with rates of
data sheets. **No figure here was measured on a GPU**; compare rows with each other. For a load of your own:
`kunserve plan --gpus 8xH100 --model NAME --trace FILE` ([docs](plan.md)), which also simulates the policies.

Weights and KV are in 16 bits, but for [KV of 8 bits](#kv-of-8-bits); blocks have {BLOCK_SIZE} tokens, and {USABLE} of a
GPU's memory is used. A copy of the weights takes the least power of two of GPUs that hold it with a quarter more for
KV."""

CAPACITY = """\
## Tokens of KV, and what a drop gains

Each cell: copies of the weights, tokens of KV beside all of them, tokens after the largest drop (and how many times as
many that is). **With one copy nothing can be dropped**: KunServe then serves as a chain, and requests wait when KV is
full. A drop gains most where weights take most of the memory, and nothing to speak of where they take little."""

RATES = """\
## Requests a second that are carried for long

For the means of three published workloads, on eight GPUs: what KV carries without a drop, what it carries after the
largest drop, and what compute would carry had memory no end. Where weights take most of the memory the second is well
above the first. Elsewhere they are close, and **a drop is for bursts**: requests come faster than this for a while, and
need a place; GPUs do not compute more for it. Copies on several GPUs are counted with their rates added up, which a
chain does not reach."""

EIGHT_BITS = f"""\
## KV of 8 bits

What `--kv-cache-dtype fp8` changes, on eight GPUs. Each cell: with KV in 16 bits / in 8. A token takes half the
bytes, so twice as many fit; a drop frees the same bytes, which are twice as many tokens, so the ratio stays. Requests a
second are those that KV carries for long, as above, for the means of {SHARED_LOAD}. Times are of a token of every
request when one copy decodes {NUM_REQUESTS[-1]} that hold {CONTEXT:,} tokens each, with the rates of the copy's GPUs
added up. Reading KV takes half the time and nothing else less; what converting its numbers takes is left out. What it
costs in exactness: [Limits](limits.md)."""

TIMES = f"""\
## Time per token: a chain against tensor parallelism

KunServe does not split layers; GPUs that serve one copy together form a chain. Each cell: milliseconds for a token of
every request when so many are decoded together, in a chain / with tensor parallelism over the same GPUs. Each request
holds {CONTEXT:,} tokens. A chain has as many microbatches in flight as stages; links are left out of both, and so is
what tensor parallelism spends on its two reductions in each layer, so its figures are the best it could reach.

A single request is no faster in a chain than on one GPU, and longer chains are no faster than short ones until each GPU
has many rows: that is the price. Where a model needs several GPUs and few requests come at a time, take a server with
tensor parallelism. Where copies fit on one GPU, chains last as long as a burst does."""


def page() -> str:
    """Return the page as Markdown."""
    models = served_models()
    parts = [INTRODUCTION, CAPACITY, *_lines(_capacities(models)), RATES, *_lines(_rates(models))]
    parts += [EIGHT_BITS, *_lines(_eight_bits(models)), TIMES]
    for kind in TIMED_GPUS:
        parts += [f"### {kind}", *_lines(_times(models, kind))]
    return "\n\n".join(parts) + "\n"


def served_models() -> dict[str, ModelConfig]:
    """Return the models that come with cards, but for those that are there to try the server."""
    cards = [load_card(name) for name in list_cards()]
    return {card.name: card.config for card in cards if card.embedded is None}


def _lines(rows: Iterator[list[str]]) -> list[str]:
    """Return a table, whose first row is its head, as one part of the page."""
    head, *rest = rows
    return ["\n".join(table(head, rest))]


def capacity(model: ModelConfig, kind: str, count: int, kv_dtype: torch.dtype = DTYPE) -> Capacity | None:
    """Return what so many GPUs hold of a model; None if not even one copy fits."""
    try:
        return Capacity.of(model, parse_cluster(f"{count}x{kind}"), BLOCK_SIZE, kv_dtype)
    except ConfigError:
        return None


def _capacities(models: dict[str, ModelConfig]) -> Iterator[list[str]]:
    yield ["model", "GPU", *(f"{count} GPUs" for count in COUNTS)]
    for name, model in models.items():
        for kind in GPUS:
            cells = [_capacity_cell(capacity(model, kind, count)) for count in COUNTS]
            if any(cells):
                yield [name, kind, *(cell or "does not fit" for cell in cells)]


def _capacity_cell(found: Capacity | None) -> str:
    if found is None:
        return ""
    copies = f"{found.num_copies} {'copy' if found.num_copies == 1 else 'copies'}: {_thousands(found.kv_tokens)}"
    if found.dropped_kv_tokens == found.kv_tokens:
        return copies
    gain = found.dropped_kv_tokens / found.kv_tokens
    return f"{copies} → {_thousands(found.dropped_kv_tokens)} ({gain:.2f})"


def _rates(models: dict[str, ModelConfig]) -> Iterator[list[str]]:
    loads = {name: Lengths(workload.prompt.mean, workload.output.mean) for name, workload in WORKLOADS.items()}
    yield [
        "model on eight",
        *(
            f"{name} ({load.prompt:.0f} in, {load.output:.0f} out): KV, dropped, compute"
            for name, load in loads.items()
        ),
    ]
    for name, model in models.items():
        for kind in RATED_GPUS:
            found = capacity(model, kind, 8)
            if found is None:
                continue
            cost = Instances.of(model, parse_cluster(f"8x{kind}")).cost(model)
            rates = [RequestRates.of(found, cost, model.num_layers, load) for load in loads.values()]
            yield [f"{name}, {kind}", *(f"{r.kv:.1f}, {r.dropped_kv:.1f}, {r.compute:.1f}" for r in rates)]


def _eight_bits(models: dict[str, ModelConfig]) -> Iterator[list[str]]:
    workload = WORKLOADS[SHARED_LOAD]
    load = Lengths(workload.prompt.mean, workload.output.mean)
    yield [
        "model on eight",
        "bytes of a token",
        "tokens of KV",
        "after the largest drop",
        "requests a second, KV",
        "dropped",
        "ms for a token",
    ]
    for name, model in models.items():
        for kind in RATED_GPUS:
            columns = []
            for kv_dtype in (DTYPE, kv_dtype_on_gpus("fp8", model)):
                found = capacity(model, kind, 8, kv_dtype)
                if found is None:
                    continue
                cost = SimMachine.of_gpus(model, parse_cluster(f"8x{kind}"), BLOCK_SIZE, kv_dtype=kv_dtype).cost
                rates = RequestRates.of(found, cost, model.num_layers, load)
                token_s = chain_token_time(cost, model.num_layers, 1, NUM_REQUESTS[-1])
                tokens = map(_thousands, (found.kv_tokens, found.dropped_kv_tokens))
                figures = (f"{rates.kv:.1f}", f"{rates.dropped_kv:.1f}", f"{token_s * 1e3:.1f}")
                columns.append((f"{found.kv_token_bytes:,}", *tokens, *figures))
            if columns:
                yield [f"{name}, {kind}", *(" / ".join(both) for both in zip(*columns, strict=True))]


def _times(models: dict[str, ModelConfig], kind: str) -> Iterator[list[str]]:
    yield ["model", "GPUs", *(f"{n} request{'s' if n > 1 else ''}" for n in NUM_REQUESTS)]
    for name, model in models.items():
        fewest = _gpus_of_a_copy(model, kind)
        for length in (length for length in CHAINS if length >= fewest):
            one, all_gpus = (_cost(model, kind, gpus) for gpus in (1, length))
            cells = []
            for number in NUM_REQUESTS:
                chain_s = chain_token_time(one, model.num_layers, length, number)
                tensor_s = chain_token_time(all_gpus, model.num_layers, 1, number)
                same = f"{chain_s * 1e3:.1f}"
                cells.append(same if length == 1 else f"{same} / {tensor_s * 1e3:.1f}")
            yield [name, str(length), *cells]


def _gpus_of_a_copy(model: ModelConfig, kind: str) -> int:
    return Instances.of(model, parse_cluster(f"{1 << 10}x{kind}")).gpus


def _cost(model: ModelConfig, kind: str, gpus: int) -> CostModel:
    """Return the predicted times of GPUs that compute every layer together: their rates added up."""
    return Instances(parse_cluster(f"{gpus}x{kind}"), gpus).cost(model)


def chain_token_time(cost: CostModel, num_layers: int, num_stages: int, num_requests: int) -> float:
    """Return the seconds from one token of a request to its next, in a chain that decodes so many requests.

    The requests are shared out to as many microbatches as there are stages; a microbatch comes back to the first stage
    once it has been through all of them, and no sooner than the others have been through the slowest.
    """
    num_microbatches = min(num_stages, num_requests)
    rows = num_requests / num_microbatches
    work = Work(*(rows * amount for amount in Work.of([TokenSpan(CONTEXT - 1, 1, 1)])))

    def stage_times(last: int) -> list[float]:
        """Return each stage's time if the last one, which has the head, holds so many layers."""
        shares = [*_shares(num_layers - last, num_stages - 1), last]
        ends = range(num_stages)
        return [
            cost.work_time(layers, work, is_first=end == 0, head_share=float(end == num_stages - 1))
            for end, layers in zip(ends, shares, strict=True)
        ]

    choices = range(1, num_layers // num_stages + 1) if num_stages > 1 else (num_layers,)
    times = min((stage_times(last) for last in choices), key=max)
    return max(sum(times), num_microbatches * max(times))


def _shares(total: int, count: int) -> list[int]:
    """Return `total` in `count` whole shares that differ by one at most, the larger ones first."""
    return [total // count + (i < total % count) for i in range(count)]


def _thousands(tokens: int) -> str:
    return f"{tokens / 1000:,.0f}k"
