// A recording instead of a server: the same view, moved through time.
import { byId, clock, say } from "./dom.js";
import { apply } from "./frame.js";
import { History } from "./history.js";
import { View } from "./view.js";

const events = JSON.parse(byId("recording").textContent); // [name, data], in order

for (const id of ["talk", "burst", "key-form", "loading"]) byId(id).remove();
byId("main").hidden = byId("replay").hidden = false;
byId("transitions").classList.add("alone");
say(byId("connection"), "recording");

/** The frame after the first `count` events, beginning from one that is known. */
function advance(frame, from, to) {
  for (const [name, data] of events.slice(from, to)) {
    if (name === "snapshot") frame = structuredClone(data);
    else apply(frame, data);
  }
  return frame;
}

// Once through, for the charts: they show the whole run, with a line at the moment that the rest shows.
const history = new History();
const times = []; // of each event, since the first
let whole = null;
for (const [i] of events.entries()) {
  whole = advance(whole, i, i + 1);
  history.push(whole);
  times.push(whole.at_s - history.startS);
}
const duration = times[times.length - 1];
const view = new View(history, () => [0, Math.max(1, duration)]);
const [play, seek, speed] = ["play", "seek", "speed"].map(byId);
let now = 0;
let shown = 0; // events that `frame` has seen
let frame = null;
let lastMs = null; // of the picture before, while playing

function show(at) {
  now = Math.max(0, Math.min(duration, at));
  let end = times.findIndex((time) => time > now);
  if (end < 0) end = events.length;
  if (end < shown || frame === null) {
    frame = null;
    shown = 0;
  }
  frame = advance(frame, shown, Math.max(1, end));
  shown = Math.max(1, end);
  seek.value = now;
  view.charts.playhead = now;
  view.show(frame, whole);
  say(byId("time"), `${clock(now)} of ${clock(duration)}`);
  seek.setAttribute("aria-valuetext", byId("time").textContent);
}

function step(ms) {
  if (lastMs === null) return;
  show(now + ((ms - lastMs) / 1000) * Number(speed.value));
  lastMs = ms;
  if (now >= duration) pause();
  else requestAnimationFrame(step);
}

function start() {
  if (now >= duration) show(0);
  lastMs = performance.now();
  say(play, "Pause");
  requestAnimationFrame(step);
}

function pause() {
  lastMs = null;
  say(play, "Play");
}

seek.max = duration;
play.addEventListener("click", () => (lastMs === null ? start() : pause()));
seek.addEventListener("input", () => {
  pause();
  show(Number(seek.value));
});
view.charts.onSeek = (at) => {
  pause();
  show(at);
};
const asked = /^#t=([\d.]+)$/.exec(location.hash); // a link to a moment
show(asked ? Number(asked[1]) : 0);
if (!asked && !matchMedia("(prefers-reduced-motion: reduce)").matches) start();
