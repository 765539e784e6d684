"""`kunserve top [URL]`: what the page shows, in a terminal of 80 columns, over the same feed."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import aiohttp
import orjson
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from kunserve.command.command_line import OneLineParser, checked
from kunserve.command.flags import API_KEY_VARIABLES
from kunserve.command.server_url import connection_reason, parse_server_url
from kunserve.observe.frame import Frame, apply
from kunserve.version import add_version_flag

DRAW_S = 0.25  # between two pictures
RETRY_S = 1.0
CELL_S = 1.0  # of a column in the lines of the last minute
NUM_CELLS = 60
BAR_WIDTH = 48
BARS = "▁▂▃▄▅▆▇█"
SIGNS = {"drop": "▼", "restore": "▲", "rebalance": "⇆", "lose": "†", "remove": "−", "add": "+"}
WORDS = {"lose": "device loss", "remove": "device removal", "add": "device addition"}
STYLES = {"drop": "bold red", "lose": "bold red", "remove": "bold"}
STATES = {  # of devices, but "ok"
    "suspect": "no new requests while others can take them",
    "lost": "declared dead",
    "removed": "taken out by an operator",
}
MOMENTS = ("committed", "first_token", "total")  # points in time since the start; other steps are durations


class UnreachableError(Exception):
    """There is no feed at that address, and trying again will not help."""


class Screen:
    """The picture of the newest frame, with what happened in the last minute."""

    def __init__(self) -> None:
        self.frame: Frame = {}
        self._cells: deque[dict[str, float]] = deque(maxlen=NUM_CELLS)

    def take(self, name: str, data: Mapping[str, Any]) -> None:
        """Take an event of the feed."""
        if name == "snapshot":
            self.frame = {}
        apply(self.frame, data)
        at_s = self.frame["at_s"]
        if self._cells and at_s < self._cells[-1]["at_s"]:  # a server that was started anew
            self._cells.clear()
        if not self._cells or at_s >= self._cells[-1]["at_s"] + CELL_S:
            self._cells.append({"at_s": at_s})
        cell, rates, requests = self._cells[-1], self.frame["rates"], self.frame["requests"]
        now = {
            "tok/s": rates["tok_s"],
            "running": requests["running"],
            "waiting": requests["waiting"],
            "longest gap": rates.get("gap_s", 0.0),
        }
        for line, value in now.items():
            cell[line] = max(cell.get(line, 0.0), value)

    def render(self) -> RenderableType:
        """Draw everything, at most 80 columns wide."""
        if not self.frame:
            return Text("waiting for the server")
        parts = [self._head(), Text(), self._devices(), self._cache(), Text(), self._groups(), Text(), self._lines()]
        transitions = list(self.frame["transitions"].values())
        if transitions:
            parts += [Text(), *(_transition(t) for t in reversed(transitions[-4:]))]
        elif no_drop := self.frame["copies"].get("no_drop"):
            parts += [Text(), Text(no_drop, "dim")]
        return Group(*parts)

    def _head(self) -> RenderableType:
        frame, rates = self.frame, self.frame["rates"]
        title = Text(no_wrap=True, overflow="ellipsis")
        title.append("KunServe ", "bold")
        title.append(_printable(frame["model"]), "bold cyan")
        title.append(f"  policy {frame['policy'] or 'none'}  epoch {frame['epoch']}", "dim")
        requests, dash = frame["requests"], "–"
        p50, p99 = (_seconds(rates[k]) if k in rates else dash for k in ("ttft_p50_s", "ttft_p99_s"))
        age = f" {frame['at_s'] - rates['ttft_at_s']:.0f} s ago" if "ttft_at_s" in rates else ""
        figures = Text(
            f"{rates['tok_s']:,.0f} tok/s  {requests['running']} running  {requests['waiting']} waiting  "
            f"TTFT p50 {p50} p99 {p99}{age}  preempted {requests['preemptions']}"
        )
        return Group(title, figures)

    def _devices(self) -> RenderableType:
        table = Table.grid(padding=(0, 1))
        for device in self.frame["devices"].values():
            if (state := _state(device)) in ("lost", "removed"):
                table.add_row(Text(device["name"], "bold"), Text(f" {state} ".center(BAR_WIDTH, "×"), "red"))
                continue
            used, idle = (device[part] / max(1, device["blocks"]) * device["kv"] for part in ("used", "idle"))
            table.add_row(Text(device["name"], "bold"), _bar(device, used, idle), self._sizes(device, used))
        legend = Text.assemble(
            *(("█", "blue"), " weights  ", ("▓", "yellow"), " KV used  "),
            *(("▒", "yellow"), " KV cached  ", ("░", "yellow"), " KV free  · free"),
        )
        return Group(table, *self._unfit(), legend)

    def _unfit(self) -> list[Text]:
        """Return a line for each state but "ok" that devices are in, with their names."""
        lines = []
        for state, meaning in STATES.items():
            if names := [device["name"] for device in self.frame["devices"].values() if _state(device) == state]:
                line = f"{state} ({meaning}): {', '.join(names)}"
                lines.append(Text(line, "bold red", no_wrap=True, overflow="ellipsis"))
        return lines

    def _sizes(self, device: Mapping[str, Any], used: float) -> Text:
        mib = self.frame["chunk_bytes"] / 2**20
        return Text(f"KV {used * mib:,.0f}/{device['kv'] * mib:,.0f} MiB", "dim", no_wrap=True)

    def _cache(self) -> RenderableType:
        """Say what the prefix cache keeps, and how much it finds."""
        rates, groups = self.frame["rates"], self.frame["groups"].values()
        kept = f"prefix cache: keeps {sum(group['idle'] for group in groups) * self.frame['block_size']:,} tokens"
        if "hit_share" not in rates:
            return Text(f"{kept}, no prompt so far", "dim")
        shares = f"had {rates['hit_share']:.0%} of recent prompts, {rates['hit_share_ever']:.0%} since the start"
        return Text(f"{kept}, {shares}", "dim")

    def _groups(self) -> RenderableType:
        lines = []
        for group_id, group in self.frame["groups"].items():
            line = Text(f"group {group_id}  ", no_wrap=True, overflow="ellipsis")
            chain = " → ".join(f"{device} {first}–{last - 1}" for device, first, last in group["stages"])
            line.append(f"[{chain}]", "cyan")
            size, slots = self.frame["block_size"], len(group["stages"])
            in_flight = min(group["in_flight"], slots)
            ahead = f" +{group['in_flight'] - slots}" if group["in_flight"] > slots else ""  # planned, not begun
            line.append(
                f"  {group['running']} running  {in_flight}/{slots}{ahead} in flight"
                f"  {group['used'] * size:,}/{group['blocks'] * size:,} tokens"
            )
            lines.append(line)
        return Group(*lines)

    def _lines(self) -> RenderableType:
        table = Table.grid(padding=(0, 1))
        for name in ("tok/s", "running", "waiting", "longest gap"):
            values = [cell.get(name, 0.0) for cell in self._cells]
            top = max(values, default=0.0)
            shown = _seconds(top) if name == "longest gap" else f"{top:,.0f}"
            table.add_row(name, Text("".join(_level(v, top) for v in values).rjust(NUM_CELLS), "green"), shown)
        table.add_row("", Text(self._marks().rjust(NUM_CELLS), "bold"), "")
        return table

    def _marks(self) -> str:
        """Draw a sign under each second in which a grouping became live."""
        row = [" "] * len(self._cells)
        times = [cell["at_s"] for cell in self._cells]
        for transition in self.frame["transitions"].values():
            if "committed" not in transition["seconds"]:
                continue
            at_s = transition["started_s"] + transition["seconds"]["committed"]
            column = sum(1 for time_s in times if time_s <= at_s) - 1
            if column >= 0:
                row[column] = SIGNS.get(transition["kind"], "◆")
        return "".join(row)


def _state(device: Mapping[str, Any]) -> str:
    """Return the state of a device; feeds of older servers have none."""
    return str(device.get("state", "ok"))


def _bar(device: Mapping[str, Any], used: float, idle: float, width: int = BAR_WIDTH) -> Text:
    """Draw a device's memory; each part has its own character, not only its colour."""
    parts = (device["weights"], used, idle, device["kv"] - used - idle, device["free"])
    styles = (("█", "blue"), ("▓", "yellow"), ("▒", "yellow"), ("░", "yellow"), ("·", "dim"))
    bar, done, total = Text(no_wrap=True), 0, 0.0
    for size, (sign, style) in zip(parts, styles, strict=True):
        total += size
        end = round(total / max(1, device["budget"]) * width)
        bar.append(sign * (end - done), style)
        done = end
    return bar


def _transition(transition: Mapping[str, Any]) -> Text:
    steps = transition["seconds"]
    kind = transition["kind"]
    line = Text(no_wrap=True, overflow="ellipsis")
    line.append(f"{SIGNS.get(kind, '◆')} {WORDS.get(kind, kind):<7} ", STYLES.get(kind, "bold green"))
    before, after = ("+".join(map(str, transition[which])) for which in ("old_groups", "new_groups"))
    groups = f"{before or 'none'}→{after or ('none' if 'epoch' in transition else '')}"
    parts = [f"{name} {_seconds(value)}" for name, value in steps.items() if name not in MOMENTS]
    if step := transition.get("step"):
        parts.append(f"{step} …")
    size = f"{(transition['weight_bytes'] or transition.get('planned_bytes', 0)) >> 20} MiB"
    if transition.get("num_lost"):
        size += f", {transition['num_lost']} lost"
    line.append(f"{transition['outcome']}  {groups}  {size}  {', '.join(parts)}")
    return line


def _level(value: float, top: float) -> str:
    return BARS[min(len(BARS) - 1, int(value / top * len(BARS)))] if value and top else " "


def _seconds(value: float) -> str:
    return f"{value * 1000:.0f} ms" if value < 1 else f"{value:.1f} s"


def _printable(text: str) -> str:
    """Return text without control characters: a name shall not steer the terminal."""
    return "".join(c if c.isprintable() else "�" for c in text)


async def events(url: str, key: str | None) -> AsyncIterator[tuple[str, dict[str, Any]]]:
    """Yield events of a server's feed, until it ends. UnreachableError if it has none for us."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    timeout = aiohttp.ClientTimeout(total=None, connect=10, sock_read=10)
    async with (
        aiohttp.ClientSession(headers=headers, timeout=timeout) as session,
        session.get(f"{url}/kunserve/events") as response,
    ):
        if response.status == 401:
            raise UnreachableError(f"{url} asks for its API key: kunserve top --api-key KEY")
        if response.status == 503:  # it loads its model, or has as many viewers as it takes: trying again helps
            raise aiohttp.ClientError(f"{url} is not ready (HTTP 503)")
        if response.status != 200 or response.content_type != "text/event-stream":
            answer = f"HTTP {response.status}" if response.status != 200 else response.content_type
            raise UnreachableError(f"{url} is no KunServe server: {url}/kunserve/events answers {answer}")
        name = ""
        async for line in response.content:
            if line.startswith(b"event: "):
                name = line[7:].decode().strip()
            elif line.startswith(b"data: "):
                yield name, orjson.loads(line[6:])


async def watch(url: str, key: str | None, console: Console, *, is_once: bool) -> None:
    """Draw until interrupted; once, if so wished or if this is no terminal."""
    screen = Screen()
    if is_once or not console.is_terminal:
        async for event in events(url, key):
            screen.take(*event)
            console.print(screen.render())
            return
    loop = asyncio.get_running_loop()
    with Live(console=console, auto_refresh=False, screen=True) as live:
        while True:
            try:
                due_s = 0.0
                async for event in events(url, key):
                    screen.take(*event)
                    if loop.time() >= due_s:
                        live.update(screen.render(), refresh=True)
                        due_s = loop.time() + DRAW_S
                reason = "the server ended the feed"
            except (aiohttp.ClientError, OSError) as error:
                reason = connection_reason(error)
            live.update(Group(screen.render(), Text(f"\ntrying again: {reason}", "red")), refresh=True)
            await asyncio.sleep(RETRY_S)


def make_parser() -> OneLineParser:
    """Return the parser of the command's flags."""
    parser = OneLineParser(prog="kunserve top", description="Watch a server in the terminal.")
    add_version_flag(parser)
    url = checked(parse_server_url)
    default = "http://127.0.0.1:8000"
    parser.add_argument(
        "url", nargs="?", type=url, default=default, metavar="URL", help="address of the server (default %(default)s)"
    )
    known = next((os.environ[name] for name in API_KEY_VARIABLES if os.environ.get(name)), None)
    parser.add_argument(
        "--api-key",
        default=known,
        metavar="KEY",
        help="key of the server, if it wants one (default: as for the server)",
    )
    parser.add_argument("--once", action="store_true", help="draw one picture and end")
    return parser


def main(arguments: Sequence[str]) -> None:
    """Run `kunserve top` until it is interrupted (Ctrl-C); exit with one line if there is no such server."""
    args = make_parser().parse_args(arguments)
    with contextlib.suppress(KeyboardInterrupt):
        try:
            asyncio.run(watch(args.url, args.api_key, Console(), is_once=args.once))
        except (UnreachableError, aiohttp.ClientError, OSError) as error:
            sys.exit(f"kunserve top: {connection_reason(error)}")
