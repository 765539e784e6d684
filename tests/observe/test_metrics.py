from __future__ import annotations

import itertools

from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from kunserve.engine.request import Request
from kunserve.observe.gauges import DeviceStats, EngineStats
from kunserve.observe.metrics import COUNTERS_AGE_S, Metrics
from kunserve.sampling import FinishReason, SamplingParams

LABELS = {"model_name": "tiny", "engine": "0"}
IDLE = EngineStats(num_running=0, num_waiting=0, num_blocks=0, num_used_blocks=0, block_size=16)

GAUGES = (
    *("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "gpu_cache_usage_perc"),
    *("gpu_prefix_cache_hit_rate", "cache_config_info"),
)
COUNTERS = (
    *("num_preemptions", "prompt_tokens", "generation_tokens", "prefix_cache_queries", "prefix_cache_hits"),
    *("gpu_prefix_cache_queries", "gpu_prefix_cache_hits"),
)
HISTOGRAMS = (
    *("time_to_first_token_seconds", "inter_token_latency_seconds", "e2e_request_latency_seconds"),
    *("request_time_per_output_token_seconds", "request_queue_time_seconds", "request_prefill_time_seconds"),
    *("request_decode_time_seconds", "request_inference_time_seconds", "request_prompt_tokens"),
    *("request_generation_tokens", "request_params_max_tokens", "request_params_n"),
    *("iteration_tokens_total", "request_num_preemptions"),
)


def metrics_of(stats: EngineStats = IDLE) -> Metrics:
    """On a clock that runs so fast that nothing is ever old enough to be shown again."""
    return Metrics("tiny", 100, lambda: stats, itertools.count().__next__)


def samples(metrics: Metrics) -> list[Sample]:
    families = text_string_to_metric_families(metrics.render().decode())
    return [sample for family in families for sample in family.samples]


def values(metrics: Metrics) -> dict[str, float]:
    """Samples that have only the two labels that all have, by name without prefix."""
    return {s.name.removeprefix("vllm:"): s.value for s in samples(metrics) if s.labels == LABELS}


def buckets(metrics: Metrics, name: str) -> list[float]:
    return [float(s.labels["le"]) for s in samples(metrics) if s.name == f"{name}_bucket"][:-1]


def finished(**fields: float | FinishReason) -> Request:
    request = Request("r", [1, 2, 3], SamplingParams(max_tokens=9), arrival_s=10.0)
    request.token_ids += [4, 5, 6]
    request.finish_reason = FinishReason.LENGTH
    for name, value in fields.items():
        setattr(request, name, value)
    return request


def test_the_names_dashboards_know_are_all_there_from_the_start() -> None:
    present = values(metrics_of())
    expected = [*GAUGES[:-1], *(f"{name}_total" for name in COUNTERS), *(f"{name}_count" for name in HISTOGRAMS)]
    assert [name for name in expected if present.get(name) != 0.0] == []


def test_one_sample_per_routed_gauge() -> None:
    names = [s.name for s in samples(metrics_of())]
    assert [names.count(f"vllm:{name}") for name in GAUGES] == [1] * len(GAUGES)


def test_gauges_follow_the_pool() -> None:
    stats = EngineStats(num_running=2, num_waiting=3, num_blocks=40, num_used_blocks=10, block_size=16)
    metrics = Metrics("tiny", 100, lambda: stats)
    now = values(metrics)
    assert (now["num_requests_running"], now["num_requests_waiting"]) == (2, 3)
    assert now["kv_cache_usage_perc"] == now["gpu_cache_usage_perc"] == 0.25
    stats = EngineStats(num_running=2, num_waiting=0, num_blocks=100, num_used_blocks=10, block_size=16)
    assert values(metrics)["kv_cache_usage_perc"] == 0.1
    [info] = [s for s in samples(metrics) if s.name == "vllm:cache_config_info"]
    assert info.labels == {**LABELS, "block_size": "16", "num_gpu_blocks": "100"}


def test_devices_stand_under_our_own_prefix() -> None:
    device = DeviceStats("cpu:1", weight_bytes=100, kv_bytes=20, free_bytes=3)
    metrics = metrics_of(EngineStats(0, 0, 1, 0, 16, (device,)))
    found = {s.labels["owner"]: s.value for s in samples(metrics) if s.name == "kunserve:device_memory_bytes"}
    assert found == {"weights": 100, "kv": 20, "free": 3}


def test_devices_are_counted_by_state() -> None:
    states = ("ok", "lost", "ok", "suspect")
    devices = tuple(DeviceStats(f"cpu:{i}", 0, 0, 0, state) for i, state in enumerate(states))
    for stats, counts in ((EngineStats(0, 0, 1, 0, 16, devices), (2, 1, 1, 0)), (IDLE, (0, 0, 0, 0))):
        found = {s.labels["state"]: s.value for s in samples(metrics_of(stats)) if s.name == "kunserve:devices"}
        assert found == dict(zip(("ok", "suspect", "lost", "removed"), counts, strict=True))
    assert DeviceStats("cpu:0", 1, 1, 1).state == "ok"


def test_transitions_are_counted_by_kind() -> None:
    metrics = metrics_of()
    for kind in ("drop", "restore", "rebalance", "lose", "remove", "add"):
        metrics.transition(kind, {"boundary": 0.1}, 0)
    metrics.rolled_back("add")
    metrics.device_lost()
    now = values(metrics)
    assert (now["kunserve:drops_total"], now["kunserve:restores_total"], now["kunserve:rebalances_total"]) == (1, 1, 1)
    assert now["kunserve:devices_lost_total"] == 1
    [boundary] = [s for s in samples(metrics) if s.name == "kunserve:transition_seconds_count"]
    assert (boundary.labels["step"], boundary.value) == ("boundary", 6)
    name = "kunserve:rolled_back_transitions_total"
    undone = {s.labels["kind"]: s.value for s in samples(metrics) if s.name == name}
    assert undone == {"drop": 0, "restore": 0, "rebalance": 0, "lose": 0, "remove": 0, "add": 1}


# As vLLM 0.32 writes them (v1/metrics/buckets.py): dashboards and alerts name them.
TTFT = "0.001 0.005 0.01 0.02 0.04 0.06 0.08 0.1 0.25 0.5 0.75 1 2.5 5 7.5 10 20 40 80 160 640 2560"
ITL = "0.01 0.025 0.05 0.075 0.1 0.15 0.2 0.3 0.4 0.5 0.75 1 2.5 5 7.5 10 20 40 80"
REQUEST = "0.3 0.5 0.8 1 1.5 2 2.5 5 10 15 20 30 40 50 60 120 240 480 960 1920 7680"
TOKENS = "1 2 5 10 20 50 100"


def test_buckets() -> None:
    metrics = metrics_of()
    expected = {
        "time_to_first_token_seconds": TTFT,
        "inter_token_latency_seconds": ITL,
        "request_time_per_output_token_seconds": ITL,
        **dict.fromkeys(("request_prompt_tokens", "request_generation_tokens", "request_params_max_tokens"), TOKENS),
        "request_params_n": "1 2 5 10 20",
        "iteration_tokens_total": "1 8 16 32 64 128 256 512 1024 2048 4096 8192 16384",
        "request_num_preemptions": "0 1 2 5 10 20",
    }
    for name in HISTOGRAMS:
        bounds = expected.get(name, REQUEST)
        assert buckets(metrics, f"vllm:{name}") == [float(bound) for bound in bounds.split()], name


def test_kinds_and_labels() -> None:
    """A counter that says it is a gauge breaks rate()."""
    metrics = metrics_of()
    metrics.rejection("queue_full")
    families = {f.name: f for f in text_string_to_metric_families(metrics.render().decode())}
    for names, kind in ((GAUGES, "gauge"), (COUNTERS, "counter"), (HISTOGRAMS, "histogram")):
        assert [name for name in names if families[f"vllm:{name}"].type != kind] == []
    more = {"request_success": {"finished_reason"}, "admission_rejections": {"reason"}}
    more |= {"cache_config_info": {"block_size", "num_gpu_blocks"}}
    for name in (*GAUGES, *COUNTERS, *HISTOGRAMS, *more):
        for sample in families[f"vllm:{name}"].samples:
            assert sample.labels.keys() - {"le"} == LABELS.keys() | more.get(name, set()), sample


def test_a_finished_request() -> None:
    metrics = metrics_of()
    request = finished(admitted_s=11.0, first_token_s=14.0, num_preemptions=2)
    metrics.first_token(request, 14.0)
    metrics.request_finished(request, 20.0)
    now = values(metrics)
    sums = {name: now[f"{name}_sum"] for name in HISTOGRAMS if now[f"{name}_count"] == 1}
    assert sums == {
        "time_to_first_token_seconds": 4,
        "request_time_per_output_token_seconds": 3,
        "e2e_request_latency_seconds": 10,
        "request_queue_time_seconds": 1,
        "request_prefill_time_seconds": 3,
        "request_decode_time_seconds": 6,
        "request_inference_time_seconds": 9,
        "request_prompt_tokens": 3,
        "request_generation_tokens": 3,
        "request_params_max_tokens": 9,
        "request_num_preemptions": 2,
    }
    by_reason = {
        s.labels["finished_reason"]: s.value for s in samples(metrics) if s.name == "vllm:request_success_total"
    }
    assert by_reason == {"stop": 0, "length": 1, "abort": 0, "error": 0}


def test_a_request_that_left_the_queue_has_no_times_of_its_work() -> None:
    metrics = metrics_of()
    metrics.request_finished(finished(finish_reason=FinishReason.ABORT), 20.0)
    now = values(metrics)
    assert now["e2e_request_latency_seconds_count"] == 1
    assert now["request_queue_time_seconds_count"] == now["request_decode_time_seconds_count"] == 0


def test_what_is_counted_as_it_happens() -> None:
    metrics = metrics_of()
    metrics.prompt_tokens(7)
    metrics.generation_tokens(3)
    metrics.preemption()
    metrics.step(10)
    metrics.inter_tokens([0.5])
    metrics.choices_asked(2)
    metrics.rejection("queue_full")
    for lag_s in (0.001, 0.25, 0.002):
        metrics.loop_lag(lag_s)
    now = values(metrics)
    assert (now["prompt_tokens_total"], now["generation_tokens_total"], now["num_preemptions_total"]) == (7, 3, 1)
    assert (now["iteration_tokens_total_sum"], now["inter_token_latency_seconds_sum"]) == (10, 0.5)
    assert now["request_params_n_sum"] == 2
    assert now["kunserve:event_loop_lag_max_seconds"] == 0.25
    assert now["kunserve:event_loop_lag_seconds_count"] == 3
    rejected = {s.labels["reason"]: s.value for s in samples(metrics) if s.name == "vllm:admission_rejections_total"}
    assert rejected == {"queue_full": 1, "queue_tokens_full": 0, "key_share": 0, "body_memory": 0, "body_share": 0}


def test_registries_are_apart() -> None:
    first, second = Metrics("a", 100, lambda: IDLE), Metrics("b", 100, lambda: IDLE)
    first.prompt_tokens(5)
    assert b'model_name="a"' not in second.render()


def test_gauges_are_fresh_and_counters_nearly() -> None:
    now_s, stats = 0.0, IDLE
    metrics = Metrics("tiny", 100, lambda: stats, lambda: now_s)
    assert values(metrics)["num_preemptions_total"] == 0
    metrics.preemption()
    stats = EngineStats(num_running=5, num_waiting=0, num_blocks=9, num_used_blocks=0, block_size=16)
    now_s = COUNTERS_AGE_S / 2
    seen = values(metrics)
    assert (seen["num_requests_running"], seen["num_preemptions_total"]) == (5, 0)
    now_s = COUNTERS_AGE_S
    assert values(metrics)["num_preemptions_total"] == 1
