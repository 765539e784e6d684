"""Check that a GGUF model answers twenty questions as its dequantized weights do, in the engine and in transformers.

    python scripts/check/gguf_answers.py MODEL.gguf [--tokens 48]

The engine, in this process, answers greedily from the blocks of the file, all questions at once; then from float32
weights that were made of the same blocks, one question after the other: the same tokens. transformers, with the same
weights, then reads each answer and says how likely each of its tokens was: the most likely one, wherever that is not a
near tie, which is listed. Its tokenizer and chat template make the prompts; ours has to agree. Ends in one JSON line;
exits with 1 if an answer differs. Needs transformers, and room for the float32 weights on disk and in memory: of 0.5 G
parameters twice 2 GB.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from kunserve.config import EngineConfig, parse_devices
from kunserve.engine.engine import Engine
from kunserve.engine.launch.launch import launch
from kunserve.engine.request import Request
from kunserve.engine.text.tokenizer import Tokenizer
from kunserve.model.gguf.prepare import convert_gguf
from kunserve.sampling import SamplingParams
from kunserve.sizes import ceil_div

QUESTIONS = (
    "Write a Python function that returns the n-th Fibonacci number.",
    "How do I reverse a string in Python?",
    "What does `git rebase` do, in one sentence?",
    "Write a SQL query that counts the rows of the table users.",
    "Fix this: `for i in range(10) print(i)`",
    "Write a JavaScript arrow function that adds two numbers.",
    "What is the time complexity of binary search?",
    "Write a regular expression that matches a date like 2024-01-31.",
    "Show a C program that prints Hello.",
    "How do I read a JSON file in Python?",
    "What is the capital of France?",
    "Name the three states of matter.",
    "Translate to French: the cat sleeps on the chair.",
    "How many days does a leap year have?",
    "What is the difference between TCP and UDP?",
    "Write a haiku about the sea.",
    "Continue: 2, 4, 8, 16,",
    "Why is the sky blue?",
    "Write a shell command that counts the lines of all .txt files.",
    "Give me a recipe for pancakes, in three steps.",
)
NEAR_TIE = 0.05  # of logits: rounding in other orders of summation tells such apart


async def answer(engine: Engine, name: str, prompt: Sequence[int], num_tokens: int) -> list[int]:
    """Return the greedy answer to a prompt."""
    params = SamplingParams(num_tokens, temperature=0)
    return [token async for output in engine.submit(Request(name, list(prompt), params)) for token in output.token_ids]


async def answers(path: Path, prompts: Sequence[Sequence[int]], num_tokens: int, *, at_once: bool) -> list[list[int]]:
    """Return the engine's answers, from a GGUF file or a folder, all at once or one after the other."""
    num_blocks = sum(ceil_div(len(prompt) + num_tokens, 16) for prompt in prompts)
    config = EngineConfig(str(path), devices=parse_devices("cpu:1"), num_blocks_override=num_blocks, max_model_len=512)
    served = await launch(config, "check", lambda text, share: None)
    try:
        await served.engine.start()
        tasks = [answer(served.engine, f"q{i}", prompt, num_tokens) for i, prompt in enumerate(prompts)]
        return await asyncio.gather(*tasks) if at_once else [await task for task in tasks]
    finally:
        await served.engine.stop()
        await served.close()


@torch.inference_mode()
def gaps(model: Any, prompt: Sequence[int], tokens: Sequence[int]) -> torch.Tensor:
    """Return by how much each token of an answer is less likely than the likeliest at its place: logits (N,)."""
    logits: torch.Tensor = model(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1].float()
    return logits.amax(-1) - logits.gather(-1, torch.tensor(tokens)[:, None])[:, 0]


def check(path: Path, folder: Path, num_tokens: int) -> dict[str, Any]:
    """Return how many answers are transformers', and the largest gap of a token."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    convert_gguf(path, folder)
    theirs, ours = AutoTokenizer.from_pretrained(folder), Tokenizer(folder)
    texts = [
        theirs.apply_chat_template([{"role": "user", "content": q}], tokenize=False, add_generation_prompt=True)
        for q in QUESTIONS
    ]
    prompts = [ours.encode(text, add_special_tokens=False) for text in texts]
    assert prompts == [theirs(text, add_special_tokens=False).input_ids for text in texts], "tokenizers differ"
    given = asyncio.run(answers(path, prompts, num_tokens, at_once=True))
    dequantized = asyncio.run(answers(folder, prompts, num_tokens, at_once=False))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    largest, num_exact, num_ties, num_same = 0.0, 0, 0, 0
    for question, prompt, tokens in zip(QUESTIONS, prompts, given, strict=True):
        gap = gaps(model, prompt, tokens)
        ties = [(i, round(gap[i].item(), 4)) for i in gap.nonzero()[:, 0].tolist()]
        largest = max(largest, gap.max().item())
        num_exact, num_ties = num_exact + (not ties), num_ties + len(ties)
        num_same += gap.max().item() <= NEAR_TIE
        print(f"{question}\n    {ours.decode(tokens)[:200]!r}\n    {len(tokens)} tokens", end="", flush=True)
        print("".join(f", number {i} is {by} below the likeliest" for i, by in ties), flush=True)
    return {
        "questions": len(QUESTIONS),
        "answers_as_dequantized": sum(its == tokens for its, tokens in zip(dequantized, given, strict=True)),
        "answers_as_transformers": num_same,
        "of_these_without_ties": num_exact,
        "near_ties": num_ties,
        "tokens": sum(map(len, given)),
        "largest_gap": round(largest, 4),
    }


def main() -> int:
    """Parse, check, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path)
    parser.add_argument("--tokens", type=int, default=48, help="of an answer, at most")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = check(args.path, Path(folder), args.tokens)
    print(json.dumps(result))
    same = result["answers_as_dequantized"], result["answers_as_transformers"]
    return int(min(same) < result["questions"])


if __name__ == "__main__":
    sys.exit(main())
