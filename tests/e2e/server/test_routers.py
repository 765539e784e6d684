"""What routers read from /metrics, read as they read it, while memory is regrouped under load.

llm-d takes the first sample of a family when samples bear no time (`getLatestMetric`), production-stack the last one;
AIBrix takes the one of the model's name, and falls back to random routing where one is missing.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import pytest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from e2e.engines import assert_idle, generate_all, greedy, running_engine
from e2e.tiny import WIDE_KV, TinyModels, random_prompt

LLM_D = ("vllm:num_requests_waiting", "vllm:num_requests_running", "vllm:kv_cache_usage_perc", "vllm:cache_config_info")
PRODUCTION_STACK = (
    *("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:gpu_cache_usage_perc"),
    *("vllm:gpu_prefix_cache_hit_rate", "vllm:gpu_prefix_cache_hits_total", "vllm:gpu_prefix_cache_queries_total"),
)
AIBRIX = (
    *("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:gpu_cache_usage_perc"),
    *("vllm:num_preemptions_total", "vllm:prompt_tokens_total", "vllm:generation_tokens_total"),
)


@dataclass(frozen=True, slots=True)
class Scrape:
    """All samples of one answer, by name."""

    samples: dict[str, list[Sample]]

    @classmethod
    def of(cls, body: bytes) -> Scrape:
        samples: dict[str, list[Sample]] = {}
        for family in text_string_to_metric_families(body.decode()):
            for sample in family.samples:
                samples.setdefault(sample.name, []).append(sample)
        return cls(samples)

    def first(self, name: str) -> float:
        return self.samples[name][0].value

    def last(self, name: str) -> float:
        return self.samples[name][-1].value

    def of_model(self, name: str, model: str) -> float:
        [sample] = [sample for sample in self.samples[name] if sample.labels["model_name"] == model]
        return sample.value

    @property
    def num_blocks(self) -> int:
        """As llm-d takes it, from the labels."""
        labels = self.samples["vllm:cache_config_info"][0].labels
        assert labels["block_size"] == "16"
        return int(labels["num_gpu_blocks"])

    @property
    def saturation(self) -> float:
        """llm-d's score of a pod; from 1 on it gets nothing that can wait."""
        return max(self.first("vllm:num_requests_waiting") / 5, self.first("vllm:kv_cache_usage_perc") / 0.8)

    def check(self) -> None:
        """Assert that every router finds what it looks for, and all of them the same."""
        for name in {*LLM_D, *PRODUCTION_STACK, *AIBRIX}:
            assert all(sample.timestamp is None for sample in self.samples[name])
            assert self.first(name) == self.last(name) == self.of_model(name, "test"), name
        assert self.first("vllm:gpu_cache_usage_perc") == self.first("vllm:kv_cache_usage_perc")


async def test_routers_see_the_pool_as_it_is_now(tiny_models: TinyModels) -> None:
    folder = tiny_models.folder("llama", max_position_embeddings=2048, num_hidden_layers=4, **WIDE_KV)
    settings = {"num_blocks_override": 64, "max_model_len": 512, "is_pinned": True, "chunk_bytes": 1 << 16}
    async with running_engine(folder, "cpu:2", **settings) as served:
        engine = served.engine

        def scrape() -> Scrape:
            seen = Scrape.of(served.metrics.render())
            seen.check()
            used = sum(group.num_used for group in engine.groups)
            assert seen.first("vllm:kv_cache_usage_perc") == pytest.approx(used / seen.num_blocks)
            return seen

        idle = scrape()
        assert (idle.num_blocks, idle.saturation) == (128, 0)
        prompts = [random_prompt(130, seed) for seed in range(14)]
        answers = asyncio.create_task(generate_all(engine, prompts, greedy(50)))
        while sum(group.num_used for group in engine.groups) <= 0.8 * idle.num_blocks:
            await engine.signals.next_commit()
        assert scrape().saturation > 1
        await engine.drop(is_forced=True)  # live KV cannot follow
        exchange = asyncio.gather(*served.control.tasks)
        while not exchange.done():  # what KV leaves becomes blocks of the chain only now
            assert 0 <= scrape().first("vllm:kv_cache_usage_perc") <= 1
            await engine.signals.next_commit()
        assert scrape().num_blocks > idle.num_blocks
        await answers
        await engine.restore()
        await assert_idle(engine)
        assert (scrape().num_blocks, scrape().saturation) == (idle.num_blocks, 0)
