// Everything that a frame shows, live or from a recording.
import { Charts } from "./charts.js";
import { byId, bytes, count, el, say, seconds } from "./dom.js";
import { droppedChunks, tokens } from "./frame.js";
import { Groups } from "./groups.js";
import { Memory } from "./memory.js";
import { transitionsPanel } from "./transitions.js";

const FIGURES = [
  ["tok", "tokens/s", (frame) => count(frame.rates.tok_s)],
  ["running", "running", (frame) => count(frame.requests.running)],
  ["waiting", "waiting", (frame) => count(frame.requests.waiting)],
  ["p50", "TTFT p50", (frame) => shownSeconds(frame.rates.ttft_p50_s)],
  ["p99", "TTFT p99", (frame) => shownSeconds(frame.rates.ttft_p99_s)],
  ["gap", "longest gap", (frame) => shownSeconds(frame.rates.gap_s)],
  ["kv", "KV used", (frame) => `${Math.round((100 * tokens(frame).used) / Math.max(1, tokens(frame).room))} %`],
  ["preempted", "preempted", (frame) => count(frame.requests.preemptions)],
];

const shownSeconds = (value) => (value === undefined ? "–" : seconds(value));

/** All panels but chat and burst. `range()`: the seconds that charts span. */
export class View {
  constructor(history, range) {
    this.history = history;
    this.memory = new Memory(byId("devices"));
    this.groups = new Groups(byId("queue"), byId("lanes"));
    this.charts = new Charts(byId("charts"), history, range);
    this.transitions = transitionsPanel();
    this.figures = FIGURES.map(([id, label]) => {
      const box = byId("figures").appendChild(el("div", "figure"));
      box.append(el("dt", "", label), el("dd", "", "–", { id: `figure-${id}` }));
      return box.lastChild;
    });
  }

  /** Show a frame; `whole`: the one whose transitions charts mark. */
  show(frame, whole = frame) {
    say(byId("model"), frame.model);
    say(byId("policy"), `policy: ${frame.policy || "none"}`);
    say(byId("epoch"), `epoch ${frame.epoch}`);
    for (const [i, [, , figure]] of FIGURES.entries()) say(this.figures[i], figure(frame));
    this.memory.update(frame);
    this.groups.update(frame);
    this.charts.update(whole);
    this.transitions.update(frame, this.history.startS);
    say(byId("given"), given(frame));
  }
}

/** What the drop gave, in one line. */
function given(frame) {
  const dropped = droppedChunks(frame) * frame.chunk_bytes;
  if (!dropped) return "All devices hold all their weights.";
  return `${bytes(dropped)} of weights are KV now: room for ${count(tokens(frame).room)} tokens in all.`;
}
