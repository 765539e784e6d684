"""Draw the timeline of a run, the load generator's last step; matplotlib comes with the extra `plot`."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def plot(requests: list[dict[str, Any]], metrics: list[dict[str, Any]], path: Path) -> None:
    """Draw TTFT of each request, running and waiting requests, and KV use over time: `report.details` -> `path`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (top, middle, bottom) = pyplot.subplots(3, sharex=True, figsize=(11, 8), layout="constrained")
    answered = [r for r in requests if r["ttft_s"] is not None]
    failed = [r for r in requests if r["status"] == "failed"]
    top.scatter([r["sent_s"] for r in answered], [r["ttft_s"] for r in answered], s=8, label="first token")
    if failed:
        top.scatter([r["ended_s"] for r in failed], [1e-3] * len(failed), marker="x", color="red", label="failed")
    top.set(ylabel="TTFT (s)", yscale="log" if answered else "linear")
    for server in metrics:
        suffix = f" {server['url']}" if len(metrics) > 1 else ""
        for axes, names in ((middle, ("running", "waiting")), (bottom, ("kv_usage",))):
            for name in names:
                if name in server:
                    values = [float("nan") if v is None else v for v in server[name]]
                    axes.plot(server["at_s"], values, label=name + suffix)
    middle.set(ylabel="requests")
    bottom.set(ylabel="KV use", ylim=(0, 1.05), xlabel="time (s)")
    for axes in (top, middle, bottom):
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[1]:
            axes.legend(loc="upper right")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
