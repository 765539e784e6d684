// Before there is anything to watch: the server loads its model, and says what it does and how far it is.
import { byId, say } from "./dom.js";

const ASK_MS = 500;
const PATIENCE = 2; // questions without an answer: one may be lost while the server changes from loading to serving

/** Show the progress while the server loads; false at once if it does not. `tell(state, text)` says how it is. */
export async function followLoading(tell) {
  let wasLoading = false;
  for (let failures = 0; ;) {
    try {
      const response = await fetch("/kunserve/loading", { cache: "no-store" });
      if (!response.ok) break; // whoever serves a model has no such address
      show(await response.json());
      tell("loading", "○ loading");
      wasLoading = true;
      failures = 0;
    } catch {
      if (!wasLoading) break;
      if (++failures >= PATIENCE) {
        fail();
        tell("lost", "✕ stopped");
      }
    }
    await new Promise((resolve) => setTimeout(resolve, ASK_MS));
  }
  byId("loading").hidden = true;
  return wasLoading;
}

function show({ text, share }) {
  byId("main").hidden = true;
  byId("loading").hidden = byId("loading-share").hidden = false;
  const bar = byId("loading-share");
  if (share) bar.value = share;
  else bar.removeAttribute("value"); // it is not known how far it is
  say(byId("loading-text"), share ? `${text}: ${Math.floor(100 * share)} %` : text);
  byId("loading-text").classList.remove("error");
}

function fail() {
  byId("loading-share").hidden = true;
  say(byId("loading-text"), "The server stopped before its model was loaded: its log says why. This page goes on asking.");
  byId("loading-text").classList.add("error");
}
