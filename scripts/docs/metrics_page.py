"""Write docs/metrics.md: every series that `/metrics` has, with the text that it carries itself."""

from __future__ import annotations

from collections.abc import Iterator

from markdown_tables import code, table
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from kunserve.engine.request import Request
from kunserve.observe.gauges import DeviceStats, EngineStats, GroupStats
from kunserve.observe.metrics import Metrics
from kunserve.sampling import SamplingParams

INTRODUCTION = """\
# Metrics

`GET /metrics` answers in Prometheus' text format. Every series carries `model_name` and `engine="0"`; what vLLM has as
well bears its name, the rest begins with `kunserve:`. Histograms have `_bucket`, `_sum` and `_count`. A scrape costs no
step: gauges are of this moment, the others at most 0.15 s old. `deploy/grafana.json` is a dashboard of these.
`_created` series are the client library's own: when it made a series."""
STATS = EngineStats(1, 0, 10, 1, 16, (DeviceStats("cpu:0", 1, 1, 1),), (GroupStats(0, 1),))
COMMON = {"model_name", "engine"}  # labels that every series has
LABEL_OF_BUCKETS = "le"


def metrics_of_everything() -> Metrics:
    """Return the metrics of a server on which everything has happened once that makes a series appear."""
    metrics = Metrics("tiny", 64, lambda: STATS)
    metrics.rejection("queue_full")
    metrics.rolled_back("drop")
    metrics.device_lost()
    metrics.transition("drop", {"remap": 0.1}, 5)
    metrics.request_finished(Request("r", [1], SamplingParams(1)), 1.0)
    return metrics


def families(metrics: Metrics) -> Iterator[Metric]:
    """Yield the families of a scrape, but for the moments at which a client library made its own series."""
    for family in text_string_to_metric_families(metrics.render().decode()):
        if not family.name.endswith("_created"):
            yield family


def name_of(family: Metric) -> str:
    """Return the name that a query uses: a counter's ends in `_total`, a histogram's in `_bucket`, `_sum`, `_count`."""
    return f"{family.name}_total" if family.type == "counter" else family.name


def page() -> str:
    """Return the page as Markdown."""
    found = list(families(metrics_of_everything()))
    lines = [INTRODUCTION]
    for prefix, title in (("vllm:", "As vLLM has them"), ("kunserve:", "KunServe's own")):
        rows = [_row(family) for family in found if family.name.startswith(prefix)]
        lines += ["", f"## {title}", "", *table(("name", "type", "labels", "what it says"), rows)]
    return "\n".join(lines) + "\n"


def _row(family: Metric) -> tuple[str, str, str, str]:
    labels = {label for sample in family.samples for label in sample.labels} - COMMON - {LABEL_OF_BUCKETS}
    return code(name_of(family)), family.type, code(", ".join(sorted(labels))) if labels else "", family.documentation
