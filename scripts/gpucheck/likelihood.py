"""GPU check: how likely a text is, before and after each change of the grouping.

Whether greedy tokens agree says little: a layout of KV that is a little wrong can leave all of them as they are. The
likelihood of each token of a text does not, nor do those of the tokens that could have stood there, which are the
logits but for a number that all of a row have in common.
"""

from __future__ import annotations

import asyncio
import importlib
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from gpucheck.serving import open_engine, prompt_of, settled
from kunserve.config import DeviceSpec, EngineConfig
from kunserve.engine.engine import Engine
from kunserve.engine.request import Request
from kunserve.errors import ConfigError
from kunserve.model.card import resolve_model
from kunserve.percentiles import quantile
from kunserve.sampling import SamplingParams, TokenLogprobs

GENERATED = "generated"  # a request that is under way through drop, exchange and restore
NUM_TOP = 20  # of the most likely tokens at each place that are compared
NUM_EXPECTED = 100  # of those that transformers names: ours are among them unless something is wrong


class Place(NamedTuple):
    """What could stand at one place of a text."""

    token_id: int  # what does
    logprobs: dict[int, float]  # its own, and those of the most likely tokens

    @classmethod
    def of(cls, found: TokenLogprobs) -> Place:
        """Return what the engine says of a place."""
        return cls(found.token_id, {**dict(found.top), found.token_id: found.logprob})

    @property
    def logprob(self) -> float:
        """Return how likely what stands there is."""
        return self.logprobs[self.token_id]


async def likelihood(config: EngineConfig, *, text_len: int, num_tokens: int) -> dict[str, Any]:
    """Return the negative log-likelihood per token of a text, on two logical devices and of a reference in float32.

    The reference is transformers on the host, or where it is missing KunServe on a CPU device; `reference` says which.
    After the launch, the drop, the restore and another drop; and of `num_tokens` tokens that requests generate while
    they go through all of that, as they came and as a text. With each: by how much the likelihoods of tokens (those of
    the text, and the `NUM_TOP` most likely at each place) differ from what they are after the launch (of what is
    generated: as a text), and from what the reference finds: on average, of 99 in 100, and at most. Of the requests
    that generate, the worst. In bf16 transformers itself is off by 0.06, 0.2 and 1.6 nats (SmolLM2, random tokens).
    """
    found = dict[str, list[Place]]()
    has_files = _has_files(config.model)
    config = replace(config, load_format="auto" if has_files else "dummy")
    async with open_engine(config) as engine:
        text = prompt_of(engine, 0, text_len)
        found["launch"] = await _places(engine, text)
        prompt, is_over = prompt_of(engine, 1, 40), asyncio.Event()
        generating = asyncio.create_task(_generate_until(is_over, engine, prompt, num_tokens))
        for name, change in (("drop", engine.drop), ("restore", engine.restore), ("second drop", engine.drop)):
            for _ in range(num_tokens // 8):
                await engine.signals.next_commit()
            await change()
            transition = await settled(engine)
            if transition["outcome"] != "done":
                raise RuntimeError(f"the {name} did not come to its end: {transition['outcome']}")
            found[name] = await _places(engine, text)
        is_over.set()
        answers = await generating
        generated = answers[0][0]
        if any(token_ids != generated for token_ids, _ in answers):
            raise RuntimeError("the same prompt has been answered otherwise")
        again = await _places(engine, prompt + generated)
    reference, (expected, expected_own) = await _reference(config, [text, prompt + generated], has_files=has_files)
    expected_own = expected_own[len(prompt) - 1 :]
    figures = {name: _compared(each, found["launch"], expected) for name, each in found.items()}
    before = again[len(prompt) - 1 :]
    own = max((own for _, own in answers), key=lambda own: _compared(own, before, expected_own)["error"]["max"])
    return {"reference": reference, **figures, GENERATED: _compared(own, before, expected_own)}


def _has_files(model: str) -> bool:
    """Return whether the weights of a model are at hand; else they are made up, which nobody else could do alike."""
    try:
        return resolve_model(model).folder is not None
    except ConfigError:
        return False


async def _reference(config: EngineConfig, texts: list[list[int]], *, has_files: bool) -> tuple[str, list[list[Place]]]:
    """Return the places of texts from the second on in float32, and by whom: transformers, or else KunServe."""
    missing = "the model's files are not here"
    if has_files:
        try:
            return _by_transformers(config.model, texts)
        except ImportError as error:
            missing = str(error)
    on_cpu = replace(config, devices=DeviceSpec("cpu", (0,)), dtype="float32", is_pinned=False)
    async with open_engine(on_cpu) as engine:
        found = [await _places(engine, text) for text in texts]
    return f"KunServe on a CPU device: no transformers ({missing})", found


def _by_transformers(model: str, texts: list[list[int]]) -> tuple[str, list[list[Place]]]:
    """Return as `_reference`. Raises ImportError where transformers is not installed."""
    transformers = importlib.import_module("transformers")
    folder = resolve_model(model).folder
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = []
    for text in texts:
        ids = torch.tensor([text])
        with torch.inference_mode():
            logprobs = reference(ids).logits[0, :-1].float().log_softmax(-1)
        own = logprobs.gather(-1, ids[0, 1:, None])[:, 0].tolist()
        top = logprobs.topk(min(NUM_EXPECTED, logprobs.shape[-1]))
        rows = zip(text[1:], own, top.indices.tolist(), top.values.tolist(), strict=True)
        found.append([Place(token, {**dict(zip(i, v, strict=True)), token: its}) for token, its, i, v in rows])
    return f"transformers {transformers.__version__}", found


async def _places(engine: Engine, text: list[int]) -> list[Place]:
    """Return what could stand at each place of a text from the second on."""
    params = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True, num_prompt_logprobs=NUM_TOP)
    found = list[Place]()
    async for output in engine.submit(Request("a text", text, params)):
        found += map(Place.of, output.prompt_logprobs)
    return found


async def _generate_until(
    is_over: asyncio.Event, engine: Engine, prompt: list[int], num_tokens: int
) -> list[tuple[list[int], list[Place]]]:
    """Return what follows a prompt, again and again, so that nobody waits in vain for a step."""
    answers = [await _generate(engine, prompt, num_tokens)]
    while not is_over.is_set():
        answers.append(await _generate(engine, prompt, num_tokens))
    return answers


async def _generate(engine: Engine, prompt: list[int], num_tokens: int) -> tuple[list[int], list[Place]]:
    """Return the tokens that follow a prompt, and what could have stood in the place of each when it came."""
    params = SamplingParams(num_tokens, temperature=0.0, ignore_eos=True, num_logprobs=NUM_TOP)
    token_ids, places = list[int](), list[Place]()
    async for output in engine.submit(Request(GENERATED, prompt, params)):
        token_ids += output.token_ids
        places += map(Place.of, output.logprobs)
    return token_ids, places


def _compared(found: list[Place], before: list[Place], expected: list[Place]) -> dict[str, Any]:
    return {
        "nll_per_token": -sum(place.logprob for place in found) / len(found),
        "change": _differences(found, before),
        "error": _differences(found, expected),
    }


def _differences(found: list[Place], others: list[Place]) -> dict[str, float]:
    """Return the mean, the 99th percentile and the largest difference of a token's logprob, of those both name."""
    pairs = zip(found, others, strict=True)
    apart = sorted(
        abs(a.logprobs[token] - b.logprobs[token]) for a, b in pairs for token in a.logprobs.keys() & b.logprobs.keys()
    )
    return {"mean": sum(apart) / len(apart), "p99": quantile(apart, 0.99), "max": apart[-1], "num": len(apart)}
