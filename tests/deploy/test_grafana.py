"""The dashboard names only metrics that a server has."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from metrics_page import metrics_of_everything
from prometheus_client.parser import text_string_to_metric_families

DASHBOARD = Path(__file__).parents[2] / "deploy" / "grafana.json"


def served() -> dict[str, set[str]]:
    """Samples by name with their labels, of a server that has done a bit of everything."""
    families = text_string_to_metric_families(metrics_of_everything().render().decode())
    return {sample.name: set(sample.labels) for family in families for sample in family.samples}


def expressions() -> list[str]:
    dashboard: dict[str, Any] = json.loads(DASHBOARD.read_text())
    found = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    found += [variable["query"] for variable in dashboard["templating"]["list"] if variable["type"] == "query"]
    return found


def test_every_metric_of_the_dashboard_exists() -> None:
    samples = served()
    assert len(expressions()) > 20
    for expression in expressions():
        names = re.findall(r"\b(?:vllm|kunserve):\w+", expression)
        assert names, expression
        assert set(names) <= samples.keys(), expression
        for labels in re.findall(r"by \(([^)]*)\)", expression):
            assert set(labels.split(", ")) <= samples[names[0]], expression


def test_legends_use_labels_that_exist() -> None:
    samples = served()
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        for target in panel["targets"]:
            for name in re.findall(r"\b(?:vllm|kunserve):\w+", target["expr"]):
                assert set(re.findall(r"{{(\w+)}}", target["legendFormat"])) <= samples[name]
