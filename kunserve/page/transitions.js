// What was regrouped, when, and how long each step of it took.
import { bytes, byId, clock, el, seconds } from "./dom.js";
import { transitionsOf } from "./frame.js";

const SIGNS = { drop: "▼", restore: "▲" };
const MOMENTS = ["committed", "first_token", "total"]; // points in time since the start; the others are durations

/** Draws `frame.transitions`, newest first. */
export class Transitions {
  constructor(list, empty) {
    this.list = list;
    this.empty = empty;
    this.shown = new Map(); // started_s -> [element, JSON]
  }

  update(frame, startS) {
    const transitions = transitionsOf(frame);
    this.empty.hidden = transitions.length > 0;
    const known = new Set(transitions.map((transition) => transition.started_s));
    for (const [key, [element]] of this.shown) {
      if (known.has(key)) continue;
      element.remove();
      this.shown.delete(key);
    }
    for (const transition of transitions) {
      const json = JSON.stringify([transition, startS]);
      const [old, oldJson] = this.shown.get(transition.started_s) ?? [];
      if (json === oldJson) continue;
      const element = item(transition, startS, frame);
      if (old) old.replaceWith(element);
      else this.list.prepend(element);
      this.shown.set(transition.started_s, [element, json]);
    }
  }
}

function item(transition, startS, frame) {
  const { kind, outcome, seconds: steps } = transition;
  const element = el("li", `transition ${kind}`, "", { "data-kind": kind, "data-outcome": outcome });
  const head = element.appendChild(el("p"));
  head.append(el("b", "kind", `${SIGNS[kind] ?? "◆"} ${kind}`), el("span", "chip", outcome));
  const to = transition.new_groups.length ? ` → ${transition.new_groups.join(" + ")}` : "";
  head.append(el("span", "", `group ${transition.old_groups.join(" + ")}${to}`));
  const at = transition.started_s - startS;
  head.append(el("time", "quiet", at < 0 ? `${clock(-at)} before` : `at ${clock(at)}`));
  const words = kind === "drop" ? "of weights became KV" : "of weights came back";
  const moved = transition.exchange_bytes ? `, ${bytes(transition.exchange_bytes)} of KV followed its layers` : "";
  const lost = transition.num_lost ? `, ${transition.num_lost} requests lost theirs and are computed again` : "";
  element.appendChild(el("p", "quiet", `${bytes(transition.weight_bytes)} ${words}${moved}${lost}`));
  element.appendChild(steptrack(steps));
  return element;
}

/** The steps as parts of a bar, and in words. */
function steptrack(steps) {
  const box = el("div", "steps");
  const names = Object.keys(steps).filter((name) => !MOMENTS.includes(name));
  const total = names.reduce((sum, name) => sum + steps[name], 0);
  const bar = box.appendChild(el("div", "step-bar", "", { "aria-hidden": "true" }));
  const list = box.appendChild(el("ul"));
  for (const [i, name] of names.entries()) {
    const part = bar.appendChild(el("i", `step-${i % 5}`));
    part.style.flexGrow = total ? steps[name] / total : 1;
    const entry = list.appendChild(el("li"));
    entry.append(el("i", `swatch step-${i % 5}`), `${name} ${seconds(steps[name])}`);
  }
  for (const name of MOMENTS) {
    if (steps[name] !== undefined) list.appendChild(el("li", "moment", `${name.replace("_", " ")} after ${seconds(steps[name])}`));
  }
  return box;
}

export const transitionsPanel = () => new Transitions(byId("transition-list"), byId("no-transitions"));
