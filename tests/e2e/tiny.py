"""Tiny models on disk, each made once, and what transformers generates with them."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from tiny_models import VOCAB_SIZE, load_reference, make_tiny_model

from e2e.reference import NearTieError, greedy_reference

# KV so wide that one chunk of 2 MiB holds only 32 blocks of 16 tokens: memory runs out soon.
WIDE_KV: dict[str, Any] = {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 64}

Case = tuple[list[int], list[int]]  # a prompt, and its greedy tokens


def random_prompt(length: int, seed: int = 0) -> list[int]:
    """Token ids without special ones."""
    return random.Random(f"{seed}/{length}").choices(range(3, VOCAB_SIZE), k=length)


class TinyModels:
    """Makes folders on demand under `root`; the same arguments give the same folder."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._cases: dict[tuple[Path, tuple[int, ...], int], list[Case]] = {}

    def folder(self, family: str, **overrides: Any) -> Path:
        """A model of `family` with `overrides` in its config."""
        digest = hashlib.sha256(repr(sorted(overrides.items())).encode()).hexdigest()[:8]
        folder = self._root / f"{family}-{digest}"
        return folder if folder.exists() else make_tiny_model(family, folder, **overrides)

    def cases(self, folder: Path, lengths: Sequence[int], num_tokens: int) -> list[Case]:
        """A random prompt of each length, and transformers' greedy tokens; prompts with near ties are passed over."""
        key = (folder, tuple(lengths), num_tokens)
        if key not in self._cases:
            model = load_reference(folder)
            self._cases[key] = [self._case(model, length, num_tokens) for length in lengths]
        return self._cases[key]

    @staticmethod
    def _case(model: Any, length: int, num_tokens: int) -> Case:
        for seed in range(10):
            prompt = random_prompt(length, seed)
            with suppress(NearTieError):
                return prompt, greedy_reference(model, prompt, num_tokens, min_margin=2e-4)
        raise AssertionError(f"only near ties after prompts of {length} tokens")
