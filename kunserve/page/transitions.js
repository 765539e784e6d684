// What was regrouped, when, and how long each step of it took.
import { bytes, byId, clock, el, say, seconds } from "./dom.js";
import { kindOf, markOf, transitionsOf } from "./frame.js";

const NONE_YET = "None so far: no burst has filled the KV cache.";
// Points in time since the start; the other steps are durations.
const MOMENTS = {
  committed: ["committed after", "From the start until the new groups were live: where the list and the charts mark it"],
  first_token: ["first token after", "From the start until the new groups gave their first token"],
  total: ["total after", "From the start until all KV was where it belongs"],
};
const STEPS = {
  boundary: ["step boundary", "The wait for the end of the steps in flight: as long as the longest of them. Nothing new starts in these groups meanwhile"],
  remap: ["remap", "Memory changes hands between weights and KV, by mapping alone: nothing is copied"],
  exchange: ["exchange", "KV of running requests follows its layers to other devices; each goes on as soon as its own has arrived"],
  shrink: ["shrink", "KV leaves the memory that the weights come back to"],
  load: ["load", "Weights are copied from the host; in a restore the chain goes on serving meanwhile"],
  split: ["split", "The wait for the step boundary at which the chain becomes groups again"],
};
const DOING = {
  drop: {
    boundary: "Waiting for the step boundary: then WEIGHTS become KV.",
    remap: "Remapping: WEIGHTS become KV.",
  },
  restore: {
    shrink: "Making room for WEIGHTS.",
    remap: "Remapping: KV makes room for WEIGHTS.",
    load: "Loading WEIGHTS, while the chain goes on serving.",
    split: "Waiting for the step boundary: WEIGHTS are back.",
  },
};

// Where the step says nothing.
const FALLBACK = {
  drop: DOING.drop.boundary,
  restore: DOING.restore.shrink,
  lose: "A device was lost: what is left of its group forms new groups.",
  rebalance: "Memory goes from one kind of KV to the other, at a step boundary of all groups.",
  remove: "A device is being taken out: what is left of its group forms new groups.",
  add: "A device is being taken in.",
};
// What a rebalance, the loss, the removal and the addition of a device are, once committed; and where they were not.
const CHANGES = {
  rebalance: "Layers with a window have another share of the KV",
  lose: "A device was lost, and its requests started over",
  remove: "A device was taken out of service",
  add: "A device was taken into service",
};
const UNDONE = { lose: "No new groups could be made of the devices that are left: that is tried again." };

/** What tells a transition from all others: merges of different groups begin at the same time. */
const keyOf = (transition) => `${transition.started_s} ${transition.old_groups}`;

/** Draws `frame.transitions`, newest first. */
export class Transitions {
  constructor(list, empty) {
    this.list = list;
    this.empty = empty;
    this.shown = new Map(); // key -> [element, JSON]
  }

  update(frame, startS) {
    const transitions = transitionsOf(frame);
    this.empty.hidden = transitions.length > 0;
    say(this.empty, frame.copies?.no_drop ? "None so far." : NONE_YET);
    const known = new Set(transitions.map(keyOf));
    for (const [key, [element]] of this.shown) {
      if (known.has(key)) continue;
      element.remove();
      this.shown.delete(key);
    }
    for (const transition of transitions) {
      const json = JSON.stringify([transition, startS]);
      const [old, oldJson] = this.shown.get(keyOf(transition)) ?? [];
      if (json === oldJson) continue;
      const element = item(transition, startS, frame);
      if (old) old.replaceWith(element);
      else this.list.prepend(element);
      this.shown.set(keyOf(transition), [element, json]);
    }
  }
}

/** 0 and 1, or 0, 1 and 2. */
const listed = (ids) => [ids.slice(0, -1).join(", "), ids[ids.length - 1]].filter((part) => part !== "").join(" and ");
const groupsOf = (ids) => `${ids.length > 1 ? "groups" : "group"} ${listed(ids)}`;

/** Which groups become which. A device that was lost may leave none, and one that is added may find none. */
function regrouping({ old_groups: before, new_groups: after, kind, outcome, epoch }) {
  if (`${before}` === `${after}`) return groupsOf(before);
  if (!before.length) return after.length ? `${groupsOf(after)} began` : "";
  if (after.length) return `${groupsOf(before)} became ${groupsOf(after)}`;
  if (outcome !== "running") return epoch === undefined ? groupsOf(before) : `${groupsOf(before)} ended`;
  const verb = { drop: "merge", restore: "split" }[kind] ?? "change";
  return `${groupsOf(before)} ${before.length > 1 ? verb : `${verb}s`}`;
}

/** What it is doing, or what came of it. */
function account(transition, { isPreparing }) {
  const { kind, outcome, step } = transition;
  if (isPreparing) {
    const planned = transition.planned_bytes ? `${bytes(transition.planned_bytes)} of weights` : "weights";
    return (DOING[kind]?.[step] ?? FALLBACK[kind] ?? "").replace("WEIGHTS", planned);
  }
  if (transition.epoch === undefined) return UNDONE[kind] ?? "Nothing was regrouped: all groups go on as before.";
  const done = result(transition);
  if (outcome === "running") return `${done}; KV of running requests follows its layers.`;
  const moved = transition.exchange_bytes ? `, ${bytes(transition.exchange_bytes)} of KV followed its layers` : "";
  const lost = transition.num_lost ? `, ${transition.num_lost} requests lost theirs and are computed again` : "";
  return `${done}${moved}${lost}.`;
}

/** What a transition did that was committed. */
function result({ kind, weight_bytes: weightBytes }) {
  const weights = `${bytes(weightBytes)} of weights`;
  if (kind in CHANGES) return weightBytes ? `${CHANGES[kind]}; ${weights} were loaded` : CHANGES[kind];
  return `${weights} ${kind === "drop" ? "became KV" : "came back"}`;
}

function item(transition, startS, frame) {
  const { kind, outcome } = transition;
  const mark = markOf(transition, frame.at_s);
  const element = el("li", `transition ${kind}`, "", { "data-kind": kind, "data-outcome": outcome });
  const head = element.appendChild(el("p"));
  head.append(el("b", "kind", kindOf(kind).join(" ")), el("span", "chip", outcome));
  head.append(el("span", "", regrouping(transition)));
  const at = (mark.isPreparing ? transition.started_s : mark.at) - startS;
  const when = at < 0 ? `${clock(-at)} before` : `${mark.isPreparing ? "since" : "at"} ${clock(at)}`;
  head.append(el("time", "quiet", when));
  element.appendChild(el("p", "quiet", account(transition, mark)));
  element.appendChild(steptrack(transition));
  return element;
}

/** The steps as parts of a bar, and in words. */
function steptrack({ seconds: steps, step: current }) {
  const box = el("div", "steps");
  const names = Object.keys(steps).filter((name) => !(name in MOMENTS));
  const total = names.reduce((sum, name) => sum + steps[name], 0);
  const bar = box.appendChild(el("div", "step-bar", "", { "aria-hidden": "true" }));
  const list = box.appendChild(el("ul"));
  for (const [i, name] of names.entries()) {
    const part = bar.appendChild(el("i", `step-${i % 5}`));
    part.style.flexGrow = total ? steps[name] / total : 1;
    const entry = list.appendChild(el("li", "", "", { title: STEPS[name]?.[1] ?? "" }));
    entry.append(el("i", `swatch step-${i % 5}`), `${STEPS[name]?.[0] ?? name} ${seconds(steps[name])}`);
  }
  if (current) list.appendChild(el("li", "current", `${STEPS[current]?.[0] ?? current} …`, { title: STEPS[current]?.[1] ?? "" }));
  for (const [name, [label, title]] of Object.entries(MOMENTS)) {
    if (steps[name] !== undefined) list.appendChild(el("li", "moment", `${label} ${seconds(steps[name])}`, { title }));
  }
  return box;
}

export const transitionsPanel = () => new Transitions(byId("transition-list"), byId("no-transitions"));
