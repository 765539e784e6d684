// Four charts over the same minutes, with drops, exchanges and restores marked by line, sign and word.
import { clock, count, el, say, seconds } from "./dom.js";
import { markOf, transitionsOf } from "./frame.js";

const HEIGHT = 150;
const DASHES = { solid: [], dashed: [7, 4], dotted: [2, 3] };

const CHARTS = [
  { title: "KV cache, tokens", show: count, series: [
    { column: "room", label: "room", colour: "--kv-line", dash: "solid", width: 2, stepped: true },
    { column: "used", label: "used", colour: "--kv-line", dash: "dashed", fill: "--kv-area" } ] },
  { title: "Requests", show: count, series: [
    { column: "running", label: "running", colour: "--run", dash: "solid", width: 2 },
    { column: "waiting", label: "waiting", colour: "--wait", dash: "dashed", fill: "--wait-area" } ] },
  { title: "TTFT, and longest gap in a stream", show: seconds, series: [
    { column: "p50", label: "p50", colour: "--run", dash: "solid", width: 2 },
    { column: "p99", label: "p99", colour: "--wait", dash: "dashed" },
    { column: "gap", label: "gap", colour: "--ink", dash: "dotted", width: 2 } ] },
  { title: "Tokens per second, mean of 3 s", show: count, series: [
    { column: "tok", label: "generated", colour: "--run", dash: "solid", width: 2, fill: "--run-area" } ] },
];

/** Draws a History into `root`. `range()`: the seconds that x axes span; `playhead`: what is shown of a recording. */
export class Charts {
  constructor(root, history, range) {
    this.history = history;
    this.range = range;
    this.playhead = null;
    this.onSeek = null;
    this.marks = [];
    this.charts = CHARTS.map((spec) => new Chart(root, spec, this));
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.remake());
    new ResizeObserver(() => this.resize()).observe(root);
  }

  update(frame) {
    const { startS } = this.history;
    this.marks = transitionsOf(frame).map((transition) => ({ ...markOf(transition, frame.at_s), startS }));
    for (const chart of this.charts) chart.draw();
  }

  /** The row that numbers are of: the newest, or that at the playhead. */
  row() {
    const { at } = this.history.columns;
    if (this.playhead === null) return at.length - 1;
    let row = at.findIndex((value) => value > this.playhead + 0.001);
    if (row < 0) row = at.length;
    return Math.max(0, row - 1);
  }

  resize() {
    for (const chart of this.charts) chart.resize();
  }

  remake() {
    for (const chart of this.charts) chart.make();
  }
}

class Chart {
  constructor(root, spec, owner) {
    this.spec = spec;
    this.owner = owner;
    const figure = root.appendChild(el("figure", "panel chart"));
    const caption = figure.appendChild(el("figcaption"));
    caption.appendChild(el("h2", "", spec.title));
    this.values = spec.series.map((series) => {
      const item = caption.appendChild(el("span", "key"));
      const line = item.appendChild(el("i", series.dash));
      line.style.color = `var(${series.colour})`;
      item.append(series.label);
      return item.appendChild(el("b"));
    });
    this.canvas = figure.appendChild(el("div", "canvas", "", { role: "img" }));
    this.make();
  }

  make() {
    this.plot?.destroy();
    const style = getComputedStyle(document.documentElement);
    const colour = (name) => style.getPropertyValue(name).trim();
    const axis = { stroke: colour("--quiet"), grid: { stroke: colour("--grid"), width: 1 }, ticks: { show: false }, font: "11px system-ui", size: 22 };
    this.plot = new uPlot({
      width: Math.max(200, this.canvas.clientWidth), height: HEIGHT,
      legend: { show: false },
      padding: [16, 16, 0, 0],
      cursor: { sync: { key: "kunserve" }, y: false, drag: { x: false, y: false }, points: { size: 7 } },
      scales: { x: { time: false, range: () => this.owner.range() }, y: { range: (_, low, high) => [0, niceTop(high, this.spec.show === seconds ? 1 : 10)] } },
      axes: [
        { ...axis, incrs: [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 1800, 3600], values: (_, splits) => splits.map(clock) },
        { ...axis, size: 46, space: 36, values: (_, splits) => splits.map(this.spec.show === seconds ? axisSeconds : axisCount) },
      ],
      series: [{}, ...this.spec.series.map((series) => ({
        stroke: colour(series.colour), width: series.width ?? 1.5, dash: DASHES[series.dash],
        fill: series.fill && colour(series.fill), points: { show: false }, spanGaps: false,
        paths: series.stepped ? uPlot.paths.stepped({ align: 1 }) : undefined,
      }))],
      hooks: {
        drawClear: [(plot) => drawBands(plot, this.owner.marks, colour)],
        draw: [(plot) => drawMarks(plot, this.owner, colour)],
        setCursor: [() => this.say()],
      },
    }, this.data(), this.canvas);
    this.plot.over.addEventListener("click", () => this.owner.onSeek?.(this.plot.posToVal(this.plot.cursor.left, "x")));
  }

  data() {
    const { columns } = this.owner.history;
    return [columns.at, ...this.spec.series.map((series) => columns[series.column])];
  }

  draw() {
    this.plot.setData(this.data());
    this.say();
  }

  resize() {
    this.plot.setSize({ width: Math.max(200, this.canvas.clientWidth), height: HEIGHT });
  }

  /** The newest values, or those under the cursor. */
  say() {
    const columns = this.data();
    const row = this.plot?.cursor.idx ?? this.owner.row();
    const shown = this.spec.series.map((series, i) => {
      const value = columns[i + 1][row];
      const text = value === null || value === undefined ? "–" : this.spec.show(value);
      say(this.values[i], text);
      return `${series.label} ${text}`;
    });
    const marks = this.owner.marks.map((mark) => mark.label).join(", ");
    this.canvas.setAttribute("aria-label", `${this.spec.title}: ${shown.join(", ")}${marks ? `; marked: ${marks}` : ""}`);
  }
}

/** The top of an axis: not so near that a line runs along it. */
function niceTop(high, empty) {
  if (!(high > 0)) return empty;
  const step = 10 ** Math.floor(Math.log10(high)) / 2;
  return Math.ceil((high * 1.05) / step) * step;
}

const axisCount = (value) => (Number.isInteger(value) ? count(value) : "");
const axisSeconds = (value) => (value === 0 ? "0" : `${Number(value.toPrecision(3))} s`);

function x(plot, mark, at) {
  return Math.round(plot.valToPos(at - mark.startS, "x", true));
}

const isSeen = (plot, position) => position >= plot.bbox.left && position <= plot.bbox.left + plot.bbox.width;

const colourOf = (mark) => ({ drop: "--drop", lose: "--error" })[mark.kind] ?? "--restore";

/** Where a band from one time to another lies within the plot; null if it does not. */
function span(plot, mark, [from, to], leastWidth) {
  const left = Math.max(plot.bbox.left, x(plot, mark, from));
  const right = Math.min(plot.bbox.left + plot.bbox.width, Math.max(left + leastWidth, x(plot, mark, to)));
  return right > left ? [left, right] : null;
}

/** Below the lines: a pale band from the start of a transition to its commit, a hatched one while KV moved. */
function drawBands(plot, marks, colour) {
  const { ctx, bbox } = plot;
  const ratio = devicePixelRatio;
  for (const mark of marks) {
    const prepared = span(plot, mark, mark.prepared, 0);
    if (prepared) {
      ctx.save();
      ctx.globalAlpha = 0.16;
      ctx.fillStyle = colour(colourOf(mark));
      ctx.fillRect(prepared[0], bbox.top, prepared[1] - prepared[0], bbox.height);
      ctx.restore();
    }
    const exchanged = mark.exchanged && span(plot, mark, mark.exchanged, 4 * ratio);
    if (!exchanged) continue;
    const [left, right] = exchanged;
    ctx.save();
    ctx.beginPath();
    ctx.rect(left, bbox.top, right - left, bbox.height);
    ctx.clip();
    ctx.globalAlpha = 0.55;
    ctx.strokeStyle = colour("--exchange");
    ctx.lineWidth = ratio;
    ctx.beginPath();
    for (let at = left - bbox.height; at < right; at += 5 * ratio) {
      ctx.moveTo(at, bbox.top + bbox.height);
      ctx.lineTo(at + bbox.height, bbox.top);
    }
    ctx.stroke();
    ctx.restore();
  }
}

/** A line where a grouping became live (or is now): drops solid, others dashed; its name on top. And the playhead. */
function drawMarks(plot, { marks, playhead }, colour) {
  const { ctx, bbox } = plot;
  const ratio = devicePixelRatio;
  const free = [-Infinity, -Infinity]; // where the next name may begin: above the plot, else within
  ctx.save();
  ctx.font = `600 ${11 * ratio}px system-ui`;
  ctx.textBaseline = "bottom";
  ctx.textAlign = "left";
  for (const mark of marks) {
    const at = x(plot, mark, mark.at);
    if (!isSeen(plot, at)) continue;
    ctx.strokeStyle = ctx.fillStyle = colour(colourOf(mark));
    ctx.lineWidth = 1.5 * ratio;
    ctx.setLineDash(mark.kind === "drop" ? [] : [5 * ratio, 4 * ratio]);
    ctx.beginPath();
    ctx.moveTo(at, bbox.top);
    ctx.lineTo(at, bbox.top + bbox.height);
    ctx.stroke();
    const text = mark.exchanged ? `${mark.label} ⇄` : mark.label;
    const width = ctx.measureText(text).width;
    const left = Math.min(Math.max(bbox.left, at - 5 * ratio), bbox.left + bbox.width - width);
    const row = free.findIndex((end) => left > end);
    if (row < 0) continue;
    const beside = at + 4 * ratio + width <= bbox.left + bbox.width ? at + 4 * ratio : at - 4 * ratio - width;
    ctx.fillText(text, row ? beside : left, bbox.top + row * 15 * ratio - ratio);
    free[row] = left + width + 6 * ratio;
  }
  if (playhead !== null) {
    ctx.fillStyle = colour("--ink");
    ctx.fillRect(Math.round(plot.valToPos(playhead, "x", true)) - ratio, bbox.top, 2 * ratio, bbox.height);
  }
  ctx.restore();
}
