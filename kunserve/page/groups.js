// Groups as lanes: a chain of stages from left to right, with its requests and the microbatches on their way.
import { count, el, say } from "./dom.js";
import { STATES, stateOf } from "./frame.js";

const MAX_DOTS = 48;
const JOIN_MS = 700;
const CHAIN = "One complete copy of the weights: on one device, or a chain of devices that each hold some of the layers";

/** Draws `frame.groups` into `lanes` and the queue into `queue`; stages slide to where they go. */
export class Groups {
  constructor(queue, lanes) {
    this.queue = queue;
    this.lanes = lanes;
    this.shape = null;
    this.parts = new Map();
    queue.append(el("b", "", "Queue"), el("span", "dots"), el("span", "quiet"));
  }

  update(frame) {
    dots(this.queue.children[1], frame.requests.waiting);
    say(this.queue.children[2], frame.requests.waiting ? `${count(frame.requests.waiting)} waiting` : "empty");
    const states = Object.fromEntries(Object.values(frame.devices).map((device) => [device.name, stateOf(device)]));
    const shape = JSON.stringify([states, Object.entries(frame.groups).map(([id, group]) => [id, group.stages])]);
    if (shape !== this.shape) this.rebuild(frame, shape, states);
    for (const [id, group] of Object.entries(frame.groups)) this.fillLane(this.parts.get(id), group, frame);
  }

  rebuild(frame, shape, states) {
    const before = new Map();
    for (const box of this.lanes.querySelectorAll(".stage")) before.set(box.dataset.device, box.getBoundingClientRect());
    this.lanes.replaceChildren();
    this.parts.clear();
    for (const [id, group] of Object.entries(frame.groups)) {
      const lane = el("div", "lane", "", { "data-group": id, "data-stages": group.stages.length });
      const head = lane.appendChild(el("p", "lane-head"));
      const chain = group.stages.length > 1 ? `chain of ${group.stages.length}` : "one device";
      head.append(el("b", "", `Group ${id}`), el("span", "chip", chain, { title: CHAIN }));
      const text = head.appendChild(el("span", "quiet"));
      const track = lane.appendChild(el("div", "track"));
      for (const [device, first, last] of group.stages) {
        track.appendChild(stage(device, states[device], first, last, frame.num_layers));
      }
      const flow = lane.appendChild(el("div", "flow", "", { "aria-hidden": "true" }));
      const running = lane.appendChild(el("div", "dots running"));
      this.lanes.appendChild(lane);
      this.parts.set(id, { text, flow, running });
    }
    this.lanes.classList.toggle("many", this.parts.size > 3);
    this.lanes.style.minHeight = `${this.lanes.offsetHeight}px`; // so that what is below does not jump up
    if (this.shape !== null) slide(this.lanes, before);
    this.shape = shape;
  }

  fillLane({ text, flow, running }, group, frame) {
    const slots = group.stages.length;
    const inFlight = Math.min(group.in_flight, slots);
    const ahead = group.in_flight - inFlight; // planned while the devices compute: it waits before the first stage
    const planned = ahead ? `, ${ahead} planned ahead` : "";
    const batches = `${inFlight} of ${slots} ${slots > 1 ? "microbatches" : "microbatch"} in flight${planned}`;
    const tokens = `${count(group.used * frame.block_size)} of ${count(group.blocks * frame.block_size)} tokens of KV`;
    const cached = group.idle ? `, ${count(group.idle * frame.block_size)} cached` : "";
    say(text, `${count(group.running)} running · ${batches} · ${tokens}${cached}`);
    while (flow.children.length > inFlight) flow.lastChild.remove();
    while (flow.children.length < inFlight) {
      const batch = flow.appendChild(el("i"));
      batch.style.animationDelay = `${-flow.children.length / slots}s`;
      batch.style.setProperty("--place", (flow.children.length - 1) / slots);
    }
    dots(running, group.running);
  }
}

function stage(device, state, first, last, numLayers) {
  const box = el("div", "stage", "", { "data-device": device, "data-state": state ?? "ok" });
  box.append(el("b", "", device), el("span", "quiet", `layers ${first}–${last - 1}`));
  if (state in STATES) box.append(el("span", "chip state", STATES[state][0], { title: STATES[state][1] }));
  const strip = box.appendChild(el("span", "strip", "", { "aria-hidden": "true" }));
  const part = strip.appendChild(el("i"));
  part.style.left = `${(100 * first) / numLayers}%`;
  part.style.width = `${(100 * (last - first)) / numLayers}%`;
  return box;
}

/** A dot per request, up to MAX_DOTS. */
function dots(root, number) {
  const shown = Math.min(number, MAX_DOTS);
  while (root.children.length > shown) root.lastChild.remove();
  while (root.children.length < shown) root.appendChild(el("i"));
  root.classList.toggle("more", number > MAX_DOTS);
}

/** Let every stage glide from where it was to where it is. */
function slide(root, before) {
  if (matchMedia("(prefers-reduced-motion: reduce)").matches) return;
  for (const box of root.querySelectorAll(".stage")) {
    const old = before.get(box.dataset.device);
    if (!old) continue;
    const now = box.getBoundingClientRect();
    const from = `translate(${old.left - now.left}px, ${old.top - now.top}px) scaleX(${old.width / now.width})`;
    const frames = [{ transform: from, transformOrigin: "0 0" }, { transform: "none", transformOrigin: "0 0" }];
    box.animate(frames, { duration: JOIN_MS, easing: "cubic-bezier(.2,.8,.2,1)" });
  }
}
