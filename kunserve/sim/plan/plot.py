"""The picture of `kunserve plan`: demand for KV beside what there is, and TTFT over time; matplotlib is an extra."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kunserve.sim.plan.outlook import Outlook
from kunserve.sim.policies import PLENTY


def draw(outlook: Outlook, reports: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Draw the simulations of an outlook, by the names of their rows."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (top, bottom) = pyplot.subplots(2, sharex=True, figsize=(11, 7), layout="constrained")
    demand, dropped = (reports[name]["memory"]["over_time"] for name in (PLENTY, "drop"))
    top.plot(demand["at_s"], demand["used_tokens"], label="demand, had memory no end", color="black")
    top.plot(dropped["at_s"], dropped["kv_tokens"], label="KV memory with drops", color="tab:red")
    top.axhline(outlook.capacity.kv_tokens, label="without", color="tab:blue", linestyle="--")
    top.set(ylabel="KV, tokens", ylim=(0, None))
    for name, report in reports.items():
        times = zip(report["answers"]["arrival_s"], report["answers"]["ttft_s"], strict=True)
        shown = [(arrival, ttft) for arrival, ttft in times if ttft is not None]
        bottom.scatter([arrival for arrival, _ in shown], [ttft for _, ttft in shown], s=6, label=name)
    bottom.set(ylabel="TTFT, s", xlabel="arrival, s", yscale="log")
    for axes in (top, bottom):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
