"""Tables and pictures of scripts/figures/paper.py: simulated figures beside the published ones, and what differs."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

Report = dict[str, Any]
Reports = dict[str, Report]

PLENTY = "plenty"  # memory for KV without end
VLLM = "vllm-0.6.3"
BASELINES = ("recompute", "swap", "migrate")
QUANTILES = ("p50", "p90", "p99", "p999")
SLO_SCALES = (2, 3, 4, 5, 6, 8, 10)
HEADER = (
    "| | TTFT p50 s | p90 | p99 | p99.9 | TPOT p50 ms | p90 | p99 | p99.9 | longest gap s | tokens/s | mean use % "
    "| peak % | preempted | transitions |\n|---|" + "---:|" * 14
)

DIFFERENT = """What differs from the paper:

- All systems but `vllm-0.6.3` are one engine: a queue for all groups, prompts in chunks, a step planned ahead. What the
  paper compares with had separate queues and engines, as that row has, so its baselines are worse than ours.
- No system knows how long answers get. `plenty` is the bound: what is left there, no memory saves.
- By datasheet rates a device with 80 GB whose KV is full spends 85 to 92 % of its time on work that no memory saves.
  What a drop frees there is a place to wait in after the first token instead of before it: with 46 % more KV, for some
  15 s. With 40 GB memory bounds throughput as well, and a burst can be answered in full that otherwise only queues up.
- A burst here is as long as what is freed lasts. A longer one ends in a queue under every policy.
- Nothing but the links, the devices and (restore) a constant for the host takes time.
- A chain loses 3 to 6 % of its devices' time in bubbles, and prompts that do not have to wait are computed within the
  burst, at the cost of output tokens: where memory does not bound throughput, drop has less of it than swap.
- Without bubbles and host a chain is as fast as its devices apart. A restore makes tokens faster again, as published,
  but first tokens wait longer in the next burst: memory that stayed dropped would already be there."""


def section(title: str, reports: Reports, out: Path) -> list[str]:
    """Write one experiment in Markdown; its pictures go to the folder `out`."""
    draw_over_time(title, reports, out / f"{_slug(title)}-over-time.png")
    lines = [f"## {title}", "", HEADER, *(row(name, report) for name, report in reports.items()), ""]
    lines += need(reports)
    match title:
        case "ablation":
            return lines + ablation(reports)
        case "restore":
            return lines + restore(reports)
        case "endless burst":
            return lines + endless(reports)
    draw_slo(title, reports, out / f"{_slug(title)}-slo.png")
    return lines + systems(reports)


def row(name: str, report: Report) -> str:
    """Return one line of the table."""
    ttft, tpot, memory = report["ttft_s"], report["tpot_s"], report["memory"]
    cells = [f"{ttft[p]:.2f}" for p in QUANTILES] + [f"{1e3 * tpot[p]:.0f}" for p in QUANTILES]
    cells += [f"{report['longest_gap_s']:.2f}", f"{report['output_tokens_per_s_while_arriving']:.0f}"]
    cells += [f"{100 * memory['mean_usage_of_undropped']:.0f}", f"{100 * memory['peak_usage_of_undropped']:.0f}"]
    return f"| {name} | {' | '.join(cells)} | {report['preemptions']} | {report['num_transitions']} |"


def need(reports: Reports) -> list[str]:
    """Return how much KV the load needs, of what the first system has mapped when it begins."""
    if PLENTY not in reports:
        return []
    memory, undropped = reports[PLENTY]["memory"], next(iter(reports.values()))["memory"]
    peak = memory["peak_usage_of_undropped"] * memory["kv_tokens"] / undropped["kv_tokens"]
    return [f"Need: {peak:.2f} of the KV that is mapped without a drop.", ""]


# --- what the tables come to ----------------------------------------------------------------------------------------


def systems(reports: Reports) -> list[str]:
    """Compare with figures 2, 12 and 13: all systems under one workload."""
    drop, baselines = reports["drop"], {name: reports[name] for name in BASELINES if name in reports}
    best = {p: min(r["ttft_s"][p] for r in baselines.values()) for p in QUANTILES}
    fastest = max(r["output_tokens_per_s_while_arriving"] for r in baselines.values())
    rise = ", ".join(f"{name} {r['ttft_s']['p99'] / r['ttft_s']['p50']:.0f}" for name, r in baselines.items())
    window = dropped_window(drop)
    lines = [
        compared("P99 TTFT over P50 (figure 2)", f"{rise} times", "recompute 239 (rise), swap 92 (rise), migrate 148"),
        compared(
            "P99 TTFT of the best baseline over drop's (figure 13)",
            f"{best['p99'] / drop['ttft_s']['p99']:.1f} times",
            "12.7 to 72.2 times",
        ),
        compared("P50 TTFT of drop", change(drop["ttft_s"]["p50"], best["p50"]), "slightly better"),
        compared(
            "P50 time per token of drop against the best baseline's, all requests",
            change(drop["tpot_s"]["p50"], min(r["tpot_s"]["p50"] for r in baselines.values())),
            "+15.8 to +22.7 % (LongBench)",
        ),
    ]
    if window:
        among = {name: tpot_within(r, window) for name, r in (baselines | {"drop": drop}).items()}
        lines.append(
            compared(
                f"mean time per token of requests that came while dropped ({window[0]:.0f} to {window[1]:.0f} s), "
                "against recompute's",
                change(among["drop"], among["recompute"]),
                "+21 to +31.9 % (figure 14)",
            )
        )
    lines.append(
        compared(
            "tokens per second of drop against the best baseline's, while requests came (figure 12)",
            change(drop["output_tokens_per_s_while_arriving"], fastest),
            "not lower",
        )
    )
    in_all = max(r["output_tokens_per_s"] for r in baselines.values())
    lines.append(
        compared("tokens per second up to the last answer", change(drop["output_tokens_per_s"], in_all), "not lower")
    )
    lines += bounds(reports, best["p99"])
    if "pipeline" in reports:
        others = [r for name, r in reports.items() if name not in ("pipeline", PLENTY)]
        most = max(r["output_tokens_per_s_while_arriving"] for r in others)
        own = reports["pipeline"]["output_tokens_per_s_while_arriving"]
        lines.append(compared("tokens per second of a static pipeline", change(own, most), "-3.3 to -21.8 %"))
    lines.append(
        compared("KV memory at most", f"{growth(drop):.2f} times", "1.57 times after two drops (72B, figure 17)")
    )
    bound = best["p50"]
    lines += ["", "| SLO misses, % at a scale of | " + " | ".join(f"{scale}x" for scale in SLO_SCALES) + " |"]
    lines.append("|---|" + "---:|" * len(SLO_SCALES))
    for name, report in reports.items():
        shares = (100 * misses(report, scale * bound) for scale in SLO_SCALES)
        lines.append(f"| {name} | " + " | ".join(f"{share:.1f}" for share in shares) + " |")
    published = "drop misses 7.2 to 12.8 % fewer on average, about none beyond 4x; baselines miss at 10x as well"
    return [*lines, "", f"Published (figure 13): {published}.", ""]


def bounds(reports: Reports, best_s: float) -> list[str]:
    """Return what no memory could better, and what the engine that is published would make of it."""
    lines, drop_s = list[str](), reports["drop"]["ttft_s"]["p99"]
    if PLENTY in reports:
        ceiling = best_s / reports[PLENTY]["ttft_s"]["p99"]
        lines.append(compared("P99 TTFT of the best baseline over plenty's: the ceiling", f"{ceiling:.1f} times", "-"))
    if VLLM in reports:
        ratio = reports[VLLM]["ttft_s"]["p99"] / drop_s
        lines.append(compared("P99 TTFT of vLLM 0.6.3 over drop's", f"{ratio:.1f} times", "12.7 to 72.2 times"))
    return lines


def ablation(reports: Reports) -> list[str]:
    """Compare with figure 14: what each part of a drop gains."""
    base, drop, coordinated, lookahead = (report for name, report in reports.items() if name != PLENTY)

    def gains(before: Report, after: Report, kind: str) -> str:
        return ", ".join(f"{p} {before[kind][p] / after[kind][p]:.2f}" for p in QUANTILES[1:])

    window = dropped_window(lookahead)
    bubbles = f"{bubble(coordinated)} to {bubble(lookahead)}"
    lines = [
        compared("TTFT, recompute over drop", gains(base, drop, "ttft_s"), "p90 8.8, p99 11.7, p999 10.3 times"),
        compared("TTFT, + coordinated exchange", gains(drop, coordinated, "ttft_s"), "p99 1.5, p999 1.4 times"),
        compared("time per token, + coordinated exchange", gains(drop, coordinated, "tpot_s"), "p90, p999 1.05 times"),
        compared(
            "time per token, + lookahead", gains(coordinated, lookahead, "tpot_s"), "p90 1.05, p99 1.12, p999 1.11"
        ),
        compared("bubbles, + lookahead", bubbles, "21.9 to 8.3 %"),
        compared(
            "tokens per second, + lookahead",
            change(lookahead["output_tokens_per_s"], coordinated["output_tokens_per_s"]),
            "+20 %",
        ),
    ]
    if window:
        tpot = change(tpot_within(lookahead, window), tpot_within(base, window))
        lines.append(compared("mean time per token of requests that came while dropped", tpot, "+21 to +31.9 %"))
    return [*lines, ""]


def restore(reports: Reports) -> list[str]:
    """Compare with figure 16: what restoring gains."""
    on, off = reports["restore"], reports["no restore"]
    pairs = [("P50 TTFT", "ttft_s", "p50", "-28 %"), ("P50 time per token", "tpot_s", "p50", "-23 %")]
    pairs += [("P99 TTFT", "ttft_s", "p99", "-84 % (6.4 times)"), ("P99 time per token", "tpot_s", "p99", "-17 %")]
    lines = [compared(name, change(on[kind][p], off[kind][p]), published) for name, kind, p, published in pairs]
    use = f"{100 * on['memory']['mean_usage_of_undropped']:.0f} %"
    return [*lines, compared("mean demand for memory", use, "51.5 %"), ""]


def endless(reports: Reports) -> list[str]:
    """Compare with figure 17: how long memory lasts in a burst that does not end."""
    ends = {name: memory_ends_s(report) for name, report in reports.items() if name != PLENTY}
    texts = {name: "not in this time" if end is None else f"second {end:.0f}" for name, end in ends.items()}
    drop, recompute = ends["drop"], ends["recompute"]
    longer = f"{(drop - BURST_S) / (recompute - BURST_S):.2f} times" if drop and recompute else "-"
    drops = sum(t["kind"] == "drop" and t["outcome"] == "done" for t in reports["drop"]["transitions"])
    return [
        compared("memory ends", ", ".join(f"{name} {text}" for name, text in texts.items()), "drop second 152"),
        compared("drop holds out longer, from the burst on", longer, "1.5 times"),
        compared("drops, KV memory at most", f"{drops}, {growth(reports['drop']):.2f} times", "2, 1.57 times"),
        "",
    ]


# --- figures of one run ---------------------------------------------------------------------------------------------

BURST_S = 45.0  # where the first burst begins


def compared(what: str, simulated: str, published: str) -> str:
    """Return a line of the comparison."""
    return f"- {what}: **{simulated}**; published: {published}"


def change(value: float, reference: float) -> str:
    """Return the change from a reference in per cent."""
    return f"{100 * (value / reference - 1):+.1f} %"


def bubble(report: Report) -> str:
    """Return the share of the time in which a stage of a chain waits, in words."""
    return "no chain" if report["bubble_share"] is None else f"{100 * report['bubble_share']:.1f} %"


def growth(report: Report) -> float:
    """Return the most KV memory over that at the start."""
    return float(report["memory"]["most_kv_tokens"] / report["memory"]["kv_tokens"])


def misses(report: Report, bound_s: float) -> float:
    """Return the share of requests whose first token took longer than `bound_s`."""
    ttft = [t for t in report["answers"]["ttft_s"] if t is not None]
    return float(np.mean([t > bound_s for t in ttft]))


def dropped_window(report: Report) -> tuple[float, float] | None:
    """Return the time from the first drop to the last restore, or to the end; None without a drop."""
    done = [t for t in report["transitions"] if t["outcome"] == "done"]
    starts = [t["started_s"] for t in done if t["kind"] == "drop"]
    ends = [t["started_s"] for t in done if t["kind"] == "restore"]
    return (starts[0], max(ends, default=report["elapsed_s"])) if starts else None


def tpot_within(report: Report, window: tuple[float, float]) -> float:
    """Return the mean seconds per token of the requests that came in a window."""
    answers = report["answers"]
    pairs = zip(answers["arrival_s"], answers["tpot_s"], strict=True)
    return float(np.mean([tpot for at_s, tpot in pairs if window[0] <= at_s < window[1] and tpot is not None]))


def memory_ends_s(report: Report) -> float | None:
    """Return from when on somebody waits, with more than 95 % of the memory in use, for five seconds at a time."""
    over = report["memory"]["over_time"]
    full = [
        waiting > 0 and used > 0.95 * kv
        for waiting, used, kv in zip(over["waiting"], over["used_tokens"], over["kv_tokens"], strict=True)
    ]
    return next((over["at_s"][i] for i in range(len(full) - 4) if all(full[i : i + 5])), None)


# --- pictures -------------------------------------------------------------------------------------------------------


def draw_over_time(title: str, reports: Reports, path: Path) -> None:
    """Draw TTFT, tokens per second, and KV capacity and use over time, a column per run (figures 2, 12, 16, 17)."""
    pyplot = _pyplot()
    size = (2.6 * len(reports) + 1, 7)
    figure, axes = pyplot.subplots(3, len(reports), figsize=size, sharex=True, sharey="row", squeeze=False)
    for column, (name, report) in zip(axes.T, reports.items(), strict=True):
        over, answers = report["memory"]["over_time"], report["answers"]
        at_s = over["at_s"]
        column[0].plot(answers["arrival_s"], [t or np.nan for t in answers["ttft_s"]], ".", markersize=2)
        column[0].set_yscale("log")
        column[1].plot(at_s[1:], [after - before for before, after in pairwise(over["output_tokens"])])
        column[2].plot(at_s, [k / 1e6 for k in over["kv_tokens"]])
        column[2].fill_between(at_s, [k / 1e6 for k in over["used_tokens"]], alpha=0.4)
        column[0].set_title(name, fontsize=9)
        column[2].set_xlabel("s")
        for transition in report["transitions"]:
            for axis in column:
                axis.axvline(transition["started_s"], color="tab:red" if transition["kind"] == "drop" else "tab:green")
    for axis, label in zip(axes[:, 0], ("TTFT, s", "tokens/s", "KV, 10⁶ tokens"), strict=True):
        axis.set_ylabel(label)
    _save(figure, f"{title} (simulated; red: drop, green: restore)", path)


def draw_slo(title: str, reports: Reports, path: Path) -> None:
    """Draw SLO misses against the scale: so many times the best baseline's P50 (figure 13, last column)."""
    figure, axis = _pyplot().subplots(figsize=(5, 3.5))
    bound = min(reports[name]["ttft_s"]["p50"] for name in BASELINES if name in reports)
    scales = np.linspace(1, 12, 45)
    for name, report in reports.items():
        axis.plot(scales, [100 * misses(report, scale * bound) for scale in scales], label=name)
    axis.set_xlabel("SLO scale")
    axis.set_ylabel("requests that miss it, %")
    axis.legend(fontsize=8)
    _save(figure, f"{title} (simulated)", path)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _save(figure: Any, title: str, path: Path) -> None:
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    _pyplot().close(figure)


def _slug(title: str) -> str:
    return title.replace(" ", "-")
