// Everything that a frame shows, live or from a recording.
import { Charts } from "./charts.js";
import { byId, bytes, count, el, say, seconds } from "./dom.js";
import { droppedChunks, isGone, tokens } from "./frame.js";
import { Groups } from "./groups.js";
import { Memory } from "./memory.js";
import { transitionsPanel } from "./transitions.js";

const TTFT = "Time to first token: from the arrival of a request, of those that got theirs in the last 10 seconds";

const FIGURES = [
  ["tok", "tokens/s", (frame) => count(frame.rates.tok_s), "Tokens generated for all requests together, in the last 2 seconds"],
  ["running", "running", (frame) => count(frame.requests.running), "Requests that hold KV and get tokens"],
  ["waiting", "waiting", (frame) => count(frame.requests.waiting), "Requests in the queue: there is no room in the KV cache for them yet"],
  ["p50", "TTFT p50", (frame) => shownSeconds(frame.rates.ttft_p50_s), `${TTFT}; half of them had it sooner`],
  ["p99", "TTFT p99", (frame) => shownSeconds(frame.rates.ttft_p99_s), `${TTFT}; 99 of 100 had it sooner`],
  ["gap", "longest gap", (frame) => shownSeconds(frame.rates.gap_s), "The longest time between two tokens of one request, in the last 2 seconds"],
  ["kv", "KV used", (frame) => `${Math.round((100 * tokens(frame).used) / Math.max(1, tokens(frame).room))} %`, "Share of the KV cache that requests hold"],
  ["hits", "from cache", (frame) => shownShare(frame.rates.hit_share), "Share of the prompt tokens that need not be computed, because an earlier request began alike and its KV is still there: of the last 1,000 prompts. Small: since the server started"],
  ["preempted", "preempted", (frame) => count(frame.requests.preemptions), "How often a request lost its KV because there was no room, and had to be computed again; since the server started"],
];
const TIMES_TO_FIRST_TOKEN = ["p50", "p99"];

const POLICIES = {
  drop: "When the KV cache is full, weights that are held more than once make room for KV",
  recompute: "When the KV cache is full, requests lose their KV and are computed again later",
  retract: "When the KV cache is full, requests lose their KV and are computed again later",
  swap: "When the KV cache is full, KV of some requests waits in host memory",
  migrate: "When the KV cache of a group is full, requests move to another group",
  queue: "Requests wait until all that they may ask for fits into the KV cache",
};

const shownShare = (value) => (value === undefined ? "–" : `${Math.round(100 * value)} %`);
const shownSeconds = (value) => (value === undefined ? "–" : seconds(value));

/** All panels but chat and burst. `range()`: the seconds that charts span. */
export class View {
  constructor(history, range) {
    this.history = history;
    this.memory = new Memory(byId("devices"));
    this.groups = new Groups(byId("queue"), byId("lanes"));
    this.charts = new Charts(byId("charts"), history, range);
    this.transitions = transitionsPanel();
    this.figures = FIGURES.map(([id, label, , title]) => {
      const box = byId("figures").appendChild(el("div", "figure", "", { title }));
      const value = el("dd", "", "–", { id: `figure-${id}` });
      box.append(el("dt", "", label), value);
      if ([...TIMES_TO_FIRST_TOKEN, "hits"].includes(id)) box.append(el("dd", "age", "", { id: `age-${id}` }));
      return value;
    });
  }

  /** Show a frame; `whole`: the one whose transitions charts mark. */
  show(frame, whole = frame) {
    say(byId("model"), frame.model);
    say(byId("policy"), `policy: ${frame.policy || "none"}`);
    byId("policy").title = POLICIES[frame.policy] ?? "";
    say(byId("epoch"), `epoch ${frame.epoch}`);
    for (const [i, [, , figure]] of FIGURES.entries()) say(this.figures[i], figure(frame));
    this.showAge(frame);
    const { hit_share_ever: ever } = frame.rates;
    say(byId("age-hits"), ever === undefined ? "" : `${shownShare(ever)} ever`);
    this.memory.update(frame);
    this.groups.update(frame);
    this.charts.update(whole);
    this.transitions.update(frame, this.history.startS);
    say(byId("given"), given(frame));
    say(byId("copies"), copies(frame));
  }

  /** In an overload no first token may come for long: the times that are known stay, dimmed, and say how old they are. */
  showAge({ at_s: now, rates }) {
    const isOld = rates.ttft_at_s !== undefined;
    for (const id of TIMES_TO_FIRST_TOKEN) {
      byId(`figure-${id}`).classList.toggle("old", isOld);
      say(byId(`age-${id}`), isOld ? `${ago(now - rates.ttft_at_s)} ago` : "");
    }
  }
}

/** What the drop gave, in one line. */
function given(frame) {
  const dropped = droppedChunks(frame) * frame.chunk_bytes;
  const serving = Object.values(frame.devices).some(isGone) ? "All devices that serve" : "All devices";
  if (!dropped) return `${serving} hold all their weights.`;
  return `${bytes(dropped)} of weights are KV now: room for ${count(tokens(frame).room)} tokens in all.`;
}

/** Whether anything can be dropped, where that is not plain to see. */
function copies({ copies: { now, at_launch: atLaunch, no_drop: why } = {} }) {
  if (why) return why;
  if (now === 1 && atLaunch > 1) return `1 of ${atLaunch} copies of the weights is left: no more can be dropped until some come back.`;
  return "";
}

const ago = (value) => (value < 120 ? `${Math.floor(value)} s` : value < 7200 ? `${Math.floor(value / 60)} min` : `${Math.floor(value / 3600)} h`);
