// A bar per device, a cell per unit of weights in its place: a unit that is dropped empties, and its cell fills with KV.
import { bytes, el, layers, say } from "./dom.js";
import { indices, isGone, STATES, stateOf } from "./frame.js";

/** Draws `frame.devices` into `root`. */
export class Memory {
  constructor(root) {
    this.root = root;
    this.bars = new Map();
  }

  update(frame) {
    for (const id of this.bars.keys()) if (!(id in frame.devices)) this.remove(id);
    for (const [id, device] of Object.entries(frame.devices)) {
      const shape = JSON.stringify([device.name, device.home, device.budget, frame.units]);
      if (this.bars.get(id)?.shape !== shape) {
        this.remove(id);
        this.bars.set(id, new Bar(this.root, device, frame.units, shape));
      }
      this.bars.get(id).update(device, frame);
    }
  }

  remove(id) {
    this.bars.get(id)?.element.remove();
    this.bars.delete(id);
  }
}

class Bar {
  constructor(root, device, units, shape) {
    this.shape = shape;
    this.names = Object.keys(units);
    this.sizes = Object.values(units);
    this.home = indices(device.home);
    this.element = el("div", "device", "", { "data-device": device.name });
    const head = this.element.appendChild(el("p", "device-head"));
    head.appendChild(el("b", "", device.name));
    this.state = head.appendChild(el("span", "chip state"));
    this.text = head.appendChild(el("span", "quiet"));
    this.bar = this.element.appendChild(el("div", "bar", "", { role: "img" }));
    this.cells = new Map();
    for (const [order, unit] of this.home.entries()) {
      const cell = el("span", unit % 2 ? "cell odd" : "cell", "", { "data-unit": this.names[unit] });
      cell.style.flexGrow = this.sizes[unit];
      cell.style.setProperty("--delay", `${Math.round((order / this.home.length) * 500)}ms`);
      this.bar.appendChild(cell);
      this.cells.set(unit, cell);
    }
    this.base = this.bar.appendChild(el("span", "cell kv base"));
    for (const cell of [...this.cells.values(), this.base]) cell.appendChild(el("i", "cached"));
    this.free = this.bar.appendChild(el("span", "cell free"));
    root.appendChild(this.element);
  }

  update(device, frame) {
    const here = new Set(indices(device.units));
    const dropped = this.home.filter((unit) => !here.has(unit));
    const size = (list) => list.reduce((sum, unit) => sum + this.sizes[unit], 0);
    const away = size(dropped);
    const base = Math.max(0, device.kv - away);
    const chunksOf = (number) => (device.blocks ? Math.min(1, number / device.blocks) * device.kv : 0);
    const usedChunks = chunksOf(device.used);
    const cachedChunks = Math.min(device.kv - usedChunks, chunksOf(device.idle ?? 0));
    this.base.style.flexGrow = base;
    this.free.style.flexGrow = device.free;
    this.free.hidden = device.free === 0;
    let start = 0; // of a cell's KV among all of the device's: what is used comes first, then what is cached
    const fill = (cell, size) => {
      const used = share(usedChunks - start, size);
      cell.style.setProperty("--fill", used.toFixed(3));
      cell.style.setProperty("--cached", (share(usedChunks + cachedChunks - start, size) - used).toFixed(3));
      start += size;
    };
    fill(this.base, base);
    for (const [unit, cell] of this.cells) {
      const isDropped = !here.has(unit);
      cell.classList.toggle("kv", isDropped);
      if (isDropped) fill(cell, this.sizes[unit]);
      const title = `${nameOf(this.names, unit)}: ${isDropped ? "dropped, KV now" : "weights"}`;
      if (cell.title !== title) cell.title = title;
    }
    const chunk = frame.chunk_bytes;
    const runs = layerRuns(here, this.names);
    const whole = runs.length ? `layers ${layers(runs)}` : "no layers";
    const figures = [
      `weights ${bytes(device.weights * chunk)} (${whole})`,
      `KV ${bytes(usedChunks * chunk)} of ${bytes(device.kv * chunk)} used`,
      ...(device.idle ? [`${bytes(cachedChunks * chunk)} cached`] : []),
      `free ${bytes(device.free * chunk)}`,
    ].join(" · ");
    const [word, meaning] = STATES[stateOf(device)] ?? ["", ""];
    const text = isGone(device) ? meaning : figures;
    say(this.state, word);
    this.state.title = meaning;
    say(this.text, text);
    this.bar.setAttribute("aria-label", `${word ? `${device.name}, ${word}` : device.name}: ${text}`);
    this.element.dataset.state = stateOf(device);
    this.element.dataset.dropped = isGone(device) ? 0 : dropped.length;
  }
}

/** What a cell holds. Without a head of its own, the model uses the embedding for both. */
function nameOf(names, unit) {
  if (names[unit] === "embed") return names.includes("head") ? "embedding" : "embedding and head";
  return names[unit].replace("layers.", "layer ");
}

/** Which share of `size` is `part`: from 0 to 1. */
function share(part, size) {
  return size ? Math.max(0, Math.min(1, part / size)) : 0;
}

/** Half-open runs of layer numbers among the units that are here. */
function layerRuns(here, names) {
  const runs = [];
  for (const [unit, name] of names.entries()) {
    if (!here.has(unit) || !name.startsWith("layers.")) continue;
    const layer = Number(name.slice(7));
    const last = runs[runs.length - 1];
    if (last && last[1] === layer) last[1]++;
    else runs.push([layer, layer + 1]);
  }
  return runs;
}
