"""GPU check: how likely a text is, before and after each change of the grouping.

Whether greedy tokens agree says little: a layout of KV that is a little wrong can leave all of them as they are. The
likelihood of each token of a text does not.
"""

from __future__ import annotations

import asyncio
import importlib
from dataclasses import replace
from typing import Any

import torch

from gpucheck.serving import open_engine, prompt_of, settled
from kunserve.config import DeviceSpec, EngineConfig
from kunserve.engine.engine import Engine
from kunserve.engine.request import Request
from kunserve.errors import ConfigError
from kunserve.model.card import resolve_model
from kunserve.sampling import SamplingParams

GENERATED = "generated"  # a request that is under way through drop, exchange and restore


async def likelihood(config: EngineConfig, *, text_len: int, num_tokens: int) -> dict[str, Any]:
    """Return the negative log-likelihood per token of a text, on two logical devices and of a reference in float32.

    The reference is transformers on the host, or where it is missing KunServe on a CPU device; `reference` says which.
    After the launch, the drop, the restore and another drop; and of `num_tokens` tokens that requests generate while
    they go through all of that, as they came and as a text. With each: by how much the likelihood of one token differs
    at most from what it is after the launch (of what is generated: as a text), and from what the reference finds. Of
    the requests that generate, the worst.
    """
    found = dict[str, list[float]]()
    has_files = _has_files(config.model)
    config = replace(config, load_format="auto" if has_files else "dummy")
    async with open_engine(config) as engine:
        text = prompt_of(engine, 0, text_len)
        found["launch"] = await _likelihoods(engine, text)
        prompt, is_over = prompt_of(engine, 1, 40), asyncio.Event()
        generating = asyncio.create_task(_generate_until(is_over, engine, prompt, num_tokens))
        for name, change in (("drop", engine.drop), ("restore", engine.restore), ("second drop", engine.drop)):
            for _ in range(num_tokens // 8):
                await engine.signals.next_commit()
            await change()
            transition = await settled(engine)
            if transition["outcome"] != "done":
                raise RuntimeError(f"the {name} did not come to its end: {transition['outcome']}")
            found[name] = await _likelihoods(engine, text)
        is_over.set()
        answers = await generating
        generated = answers[0][0]
        if any(token_ids != generated for token_ids, _ in answers):
            raise RuntimeError("the same prompt has been answered otherwise")
        again = await _likelihoods(engine, prompt + generated)
    reference, (expected, expected_own) = await _reference(config, [text, prompt + generated], has_files=has_files)
    expected_own = expected_own[len(prompt) - 1 :]
    figures = {name: _compared(each, found["launch"], expected) for name, each in found.items()}
    before = again[len(prompt) - 1 :]
    own = max((own for _, own in answers), key=lambda own: _compared(own, before, expected_own)["worst_error"])
    return {"reference": reference, **figures, GENERATED: _compared(own, before, expected_own)}


def _has_files(model: str) -> bool:
    """Return whether the weights of a model are at hand; else they are made up, which nobody else could do alike."""
    try:
        return resolve_model(model).folder is not None
    except ConfigError:
        return False


async def _reference(config: EngineConfig, texts: list[list[int]], *, has_files: bool) -> tuple[str, list[list[float]]]:
    """Return the logprobs of the tokens of texts in float32, and by whom: transformers, or where it cannot be, us."""
    missing = "the model's files are not here"
    if has_files:
        try:
            return _by_transformers(config.model, texts)
        except ImportError as error:
            missing = str(error)
    on_cpu = replace(config, devices=DeviceSpec("cpu", (0,)), dtype="float32", is_pinned=False)
    async with open_engine(on_cpu) as engine:
        found = [await _likelihoods(engine, text) for text in texts]
    return f"KunServe on a CPU device: no transformers ({missing})", found


def _by_transformers(model: str, texts: list[list[int]]) -> tuple[str, list[list[float]]]:
    """Return as `_reference`. Raises ImportError where transformers is not installed."""
    transformers = importlib.import_module("transformers")
    folder = resolve_model(model).folder
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = []
    for text in texts:
        ids = torch.tensor([text])
        with torch.inference_mode():
            logprobs = reference(ids).logits[0, :-1].float().log_softmax(-1)
        found.append(logprobs.gather(-1, ids[0, 1:, None])[:, 0].tolist())
    return f"transformers {transformers.__version__}", found


async def _likelihoods(engine: Engine, text: list[int]) -> list[float]:
    """Return the logprob of each token of a text from the second on."""
    params = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True, num_prompt_logprobs=0)
    found = list[float]()
    async for output in engine.submit(Request("a text", text, params)):
        found += [each.logprob for each in output.prompt_logprobs]
    return found


async def _generate_until(
    is_over: asyncio.Event, engine: Engine, prompt: list[int], num_tokens: int
) -> list[tuple[list[int], list[float]]]:
    """Return what follows a prompt, again and again, so that nobody waits in vain for a step."""
    answers = [await _generate(engine, prompt, num_tokens)]
    while not is_over.is_set():
        answers.append(await _generate(engine, prompt, num_tokens))
    return answers


async def _generate(engine: Engine, prompt: list[int], num_tokens: int) -> tuple[list[int], list[float]]:
    """Return the tokens that follow a prompt, and the logprob that each had when it came."""
    params = SamplingParams(num_tokens, temperature=0.0, ignore_eos=True, num_logprobs=0)
    token_ids, logprobs = list[int](), list[float]()
    async for output in engine.submit(Request(GENERATED, prompt, params)):
        token_ids += output.token_ids
        logprobs += [each.logprob for each in output.logprobs]
    return token_ids, logprobs


def _compared(found: list[float], before: list[float], expected: list[float]) -> dict[str, float]:
    return {
        "nll_per_token": -sum(found) / len(found),
        "worst_change": max(abs(a - b) for a, b in zip(found, before, strict=True)),
        "worst_error": max(abs(a - b) for a, b in zip(found, expected, strict=True)),
    }
