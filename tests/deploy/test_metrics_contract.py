"""What routers and autoscalers read of `/metrics`: recorded in a simulated burst, across a drop and a restore."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from kunserve.engine.engine import Engine
from kunserve.engine.signals import loop_time
from kunserve.sim.nodes.node import Node
from kunserve.sim.nodes.router import Load, Prefix
from kunserve.sim.options import Options, simulate
from kunserve.sim.report import Sample

MANIFEST = Path(__file__).parents[2] / "deploy" / "kubernetes" / "autoscaled.yaml"
# What llm-d's endpoint picker asks of vLLM's servers (its core metrics extractor), by what it takes them for.
PICKER = {
    "queue": "vllm:num_requests_waiting",
    "running": "vllm:num_requests_running",
    "kv usage": "vllm:kv_cache_usage_perc",
    "cache": "vllm:cache_config_info",
}
TOLERANCE = 0.1  # of the HPA


class Scrape(NamedTuple):
    """The samples of one scrape by name, and how many blocks were mapped then."""

    at_s: float
    samples: dict[str, list[tuple[dict[str, str], float]]]
    truth: Sample

    def one(self, name: str) -> float:
        """The value of a metric that has one sample."""
        [(_, value)] = self.samples[name]
        return value

    @property
    def is_dropped(self) -> bool:
        """Whether weights are dropped."""
        return self.one("kunserve:weights_dropped_bytes") > 0


def samples_of(node: Node) -> dict[str, list[tuple[dict[str, str], float]]]:
    """What a scrape of a server says now."""
    samples = dict[str, list[tuple[dict[str, str], float]]]()
    for family in text_string_to_metric_families(node.engine.metrics.render().decode()):
        for each in family.samples:
            samples.setdefault(each.name, []).append((each.labels, each.value))
    return samples


@pytest.fixture(scope="module")
def scrapes() -> list[Scrape]:
    """All scrapes of a burst on one server of two GPUs."""
    found: list[Scrape] = []
    sample = Node.sample

    def scrape(node: Node) -> Sample:
        truth = sample(node)
        found.append(Scrape(truth.at_s, samples_of(node), truth))
        return truth

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Node, "sample", scrape)
        burst = Options(
            cluster="2xA800",
            memory_gib=39.0,
            workload="longbench",
            rate=0.5,
            duration_s=90.0,
            burst_height=4.0,
            burst_s=30.0,
        )
        report = simulate(burst)
    assert [t["kind"] for t in report["transitions"]] == ["drop", "restore"]
    return found


def test_a_picker_reads_the_truth_across_a_drop_and_a_restore(scrapes: list[Scrape]) -> None:
    assert {scrape.is_dropped for scrape in scrapes} == {True, False} and not scrapes[-1].is_dropped
    for scrape in scrapes:
        waiting, running, usage = (scrape.one(PICKER[name]) for name in ("queue", "running", "kv usage"))
        assert (waiting, running) == (scrape.truth.num_waiting, scrape.truth.num_running)
        [(labels, one)] = scrape.samples[PICKER["cache"]]
        num_blocks = int(labels["num_gpu_blocks"])
        assert one == 1.0 and num_blocks >= scrape.truth.num_blocks > 0 and int(labels["block_size"]) == 64
        assert 0.0 <= usage <= 1.0 and round(usage * num_blocks) == scrape.truth.num_used
    sizes = [int(scrape.samples[PICKER["cache"]][0][0]["num_gpu_blocks"]) for scrape in scrapes]
    dropped = [size for size, scrape in zip(sizes, scrapes, strict=True) if scrape.is_dropped]
    assert sizes[0] == sizes[-1] and max(dropped) > 1.5 * sizes[0]


def wanted(scrape: Scrape, query: str, threshold: float) -> int:
    """Return how many pods KEDA's HPA wants of one that it asks about, by its formula for AverageValue."""
    match = re.fullmatch(r"sum\(([\w:]+)(?:\{([^}]*)\})?\)", query)
    assert match, query
    # `namespace` and `service` are labels that Prometheus puts on what it scrapes: a scrape itself has none of them.
    assert {label.partition("=")[0] for label in (match[2] or "").split(",") if label} <= {"namespace", "service"}
    total = sum(value for _, value in scrape.samples[match[1]])
    return 1 if total / threshold <= 1 + TOLERANCE else math.ceil(total / threshold - 1e-6)


def test_keda_scales_while_dropped_where_kv_usage_would_not(scrapes: list[Scrape]) -> None:
    objects = {each["kind"]: each for each in yaml.safe_load_all(MANIFEST.read_text()) if each}
    [trigger] = objects["ScaledObject"]["spec"]["triggers"]
    query, threshold = trigger["metadata"]["query"], float(trigger["metadata"]["threshold"])
    assert trigger["metricType"] == "AverageValue"
    usage = "sum(vllm:kv_cache_usage_perc)"
    [service] = {each["metadata"]["name"] for kind, each in objects.items() if kind == "Service"}
    assert f'service="{service}"' in query
    burst = [scrape for scrape in scrapes if scrape.is_dropped and 45.0 <= scrape.at_s < 75.0]
    assert len(burst) > 15
    assert all(wanted(scrape, query, threshold) >= 2 for scrape in burst)
    assert all(wanted(scrape, usage, threshold) == 1 for scrape in burst)
    calm = [scrape for scrape in scrapes if scrape.at_s < 40.0]
    assert all(wanted(scrape, query, threshold) == 1 for scrape in calm)


class StalePicker:
    """The picker's scorers over what it has scraped, which is as old as a scrape may get; both are counted."""

    def __init__(self, patch: pytest.MonkeyPatch, scrape_every_s: float) -> None:
        self.ages_s: list[float] = []  # of what a decision was made on
        self.sizes: list[int] = []  # of a pool, in blocks, as it was seen
        self._every_s = scrape_every_s
        self._seen: dict[Engine, tuple[float, Load]] = {}
        patch.setattr(Node, "load", lambda node: self._load(node))
        patch.setattr("kunserve.sim.options.make_router", lambda name, seed: Prefix())

    def _load(self, node: Node) -> Load:
        last_s, _ = self._seen.get(node.engine, (-math.inf, None))
        if loop_time() - last_s >= self._every_s:
            self._seen[node.engine] = loop_time(), self._scraped(node)
        at_s, load = self._seen[node.engine]
        self.ages_s.append(loop_time() - at_s)
        self.sizes.append(load.num_blocks)
        return load

    def _scraped(self, node: Node) -> Load:
        samples = samples_of(node)
        [(labels, _)] = samples[PICKER["cache"]]
        waiting, running, usage = (samples[PICKER[name]][0][1] for name in ("queue", "running", "kv usage"))
        return Load(int(waiting + running), int(waiting), usage, int(labels["num_gpu_blocks"]))


def test_a_picker_with_old_metrics_loses_nobody_across_drops_and_restores() -> None:
    """It sees pools as they were five seconds ago: smaller just after a drop, and larger just after a restore."""
    burst = Options(
        cluster="2xA800",
        memory_gib=39.0,
        workload="longbench",
        rate=1.0,
        duration_s=90.0,
        burst_height=4.0,
        burst_s=30.0,
        nodes=2,
    )
    with pytest.MonkeyPatch.context() as patch:
        picker = StalePicker(patch, 5.0)
        report = simulate(burst)
    kinds = [transition["kind"] for transition in report["transitions"]]
    assert {"drop", "restore"} <= set(kinds) and max(picker.ages_s) > 4.0
    assert max(picker.sizes) > 1.5 * min(picker.sizes)  # it has seen pools with and without a drop
    assert report["finished"] == report["requests"] > 50
    assert report["slo_attainment"] > 0.95  # of first tokens within 5 s, as with metrics of the moment
