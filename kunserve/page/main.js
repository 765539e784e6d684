// The page of a live server: reads the feed, and starts again whenever it breaks.
import { startBurst } from "./burst.js";
import { startChat } from "./chat.js";
import { byId, say } from "./dom.js";
import { bearer, eventsOf, keys, reasonOf } from "./feed.js";
import { apply } from "./frame.js";
import { History } from "./history.js";
import { followLoading } from "./loading.js";
import { View } from "./view.js";

const SPAN_S = 120;
const RETRY_MS = [500, 1000, 2000, 5000];

const history = new History(SPAN_S);
const newest = () => history.columns.at[history.columns.at.length - 1] ?? 0;
const view = new View(history, () => [Math.max(0, newest() - SPAN_S), Math.max(30, newest())]);
let frame = null;
let isDue = false;

startChat(() => frame?.model);
const allowBurst = startBurst();

/** Draw once per picture of the screen, however many updates came. */
function draw() {
  isDue = false;
  byId("main").hidden = false;
  view.show(frame);
  allowBurst(frame.has_admin);
}

function take(name, data) {
  if (name === "past") {
    for (const before of JSON.parse(data)) history.push(before);
    return;
  }
  if (name === "snapshot") frame = JSON.parse(data);
  else apply(frame, JSON.parse(data));
  history.push(frame);
  if (!isDue) requestAnimationFrame(draw);
  isDue = true;
}

function tell(state, text) {
  const chip = byId("connection");
  chip.dataset.state = state;
  say(chip, text);
}

/** Follow the feed once, to its end. */
async function watch() {
  const response = await fetch("/kunserve/events?past", { headers: bearer(keys.get("api")), cache: "no-store" });
  if (response.status === 401) return askForKey();
  if (response.status === 503 && (await followLoading(tell))) return;
  if (!response.ok) throw new Error(await reasonOf(response));
  tell("live", "● live");
  for await (const [name, data] of eventsOf(response)) take(name, data);
  throw new Error("the server ended the feed");
}

/** Resolves when a key was given. */
function askForKey() {
  const form = byId("key-form");
  const field = byId("api-key");
  const wasGiven = keys.get("api") !== "";
  tell("closed", wasGiven ? "✕ wrong key" : "○ key needed");
  form.hidden = false;
  field.focus();
  return new Promise((resolve) => {
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      keys.set("api", field.value);
      form.hidden = true;
      resolve();
    }, { once: true });
  });
}

async function run() {
  for (let failures = 0; ; failures++) {
    const before = frame;
    try {
      await watch();
    } catch (error) {
      tell("lost", `○ reconnecting: ${error.message}`);
      if (frame !== before) failures = 0; // it had worked
      await new Promise((resolve) => setTimeout(resolve, RETRY_MS[Math.min(failures, RETRY_MS.length - 1)]));
    }
  }
}

run();
