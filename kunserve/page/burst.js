// The button that starts a burst: the server makes the requests, for as long as this page waits for its answer.
import { byId, count, say, seconds } from "./dom.js";
import { bearer, keys, reasonOf } from "./feed.js";

/** The burst form. Returns what tells it whether the server has an admin key at all. */
export function startBurst() {
  const [form, start, cancel, state, key] = ["burst-form", "burst-start", "burst-cancel", "burst-state", "admin-key"].map(byId);
  let running = null;
  key.value = keys.get("admin");

  async function burst() {
    const number = (id) => Number(byId(id).value);
    const body = JSON.stringify({
      requests: number("burst-requests"), rate: number("burst-rate"),
      prompt_tokens: number("burst-in"), output_tokens: number("burst-out"),
    });
    const headers = { "Content-Type": "application/json", ...bearer(key.value) };
    const response = await fetch("/kunserve/burst", { method: "POST", headers, body, signal: running.signal });
    if (!response.ok) throw new Error(await reasonOf(response));
    keys.set("admin", key.value);
    const done = await response.json();
    const rest = [[done.refused, "refused: the queue was full"], [done.failed, "failed"]];
    const words = rest.filter(([n]) => n).map(([n, what]) => `, ${count(n)} ${what}`).join("");
    return `${count(done.completed)} completed in ${seconds(done.seconds)}${words}.`;
  }

  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    if (running) return;
    running = new AbortController();
    start.hidden = true;
    cancel.hidden = false;
    cancel.focus();
    say(state, "The burst is under way; leaving this page ends it.");
    state.classList.remove("error");
    try {
      say(state, await burst());
    } catch (error) {
      const isCancelled = error.name === "AbortError";
      say(state, isCancelled ? "Cancelled: its requests were ended." : error.message);
      state.classList.toggle("error", !isCancelled);
    }
    running = null;
    const hadFocus = document.activeElement === cancel;
    start.hidden = false;
    cancel.hidden = true;
    if (hadFocus) start.focus();
  });
  cancel.addEventListener("click", () => running?.abort());

  return (hasAdmin) => {
    if (start.disabled === !hasAdmin) return;
    start.disabled = !hasAdmin;
    say(state, hasAdmin ? "" : "Start the server with --admin-key KEY to allow bursts from here.");
  };
}
