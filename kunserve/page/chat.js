// A conversation with the model, streamed.
import { byId, el } from "./dom.js";
import { bearer, eventsOf, keys, reasonOf } from "./feed.js";

/** The chat box. `model()` names the model that is asked. */
export function startChat(model) {
  const ids = ["chat-form", "prompt", "messages", "send", "stop", "fresh"];
  const [form, prompt, list, send, stop, fresh] = ids.map(byId);
  const messages = [];
  let asking = null;

  function add(role, text) {
    const item = list.appendChild(el("li", `message ${role}`));
    item.appendChild(el("b", "", role === "user" ? "You" : "Model"));
    const content = item.appendChild(el("p", "", text));
    list.scrollTop = list.scrollHeight;
    return content;
  }

  /** Streams into `content`; true if the answer was cut off. */
  async function answer(content) {
    let isCut = false;
    const body = JSON.stringify({ model: model(), messages, stream: true });
    const headers = { "Content-Type": "application/json", ...bearer(keys.get("api")) };
    const response = await fetch("/v1/chat/completions", { method: "POST", headers, body, signal: asking.signal });
    if (!response.ok) throw new Error(await reasonOf(response));
    for await (const [, data] of eventsOf(response)) {
      if (data === "[DONE]") break;
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message);
      const choice = event.choices[0];
      content.textContent += choice?.delta?.content ?? "";
      isCut ||= choice?.finish_reason === "length";
      list.scrollTop = list.scrollHeight;
    }
    return isCut;
  }

  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    const text = prompt.value.trim();
    if (!text || asking) return;
    prompt.value = "";
    messages.push({ role: "user", content: text });
    add("user", text);
    const content = add("assistant", "");
    asking = new AbortController();
    send.hidden = fresh.hidden = true;
    stop.hidden = false;
    content.parentElement.classList.add("writing");
    try {
      const isCut = await answer(content);
      messages.push({ role: "assistant", content: content.textContent });
      if (isCut) content.parentElement.appendChild(el("p", "quiet", "cut off: the model's context is full"));
    } catch (error) {
      messages.pop();
      const reason = error.name === "AbortError" ? "stopped" : error.message;
      content.parentElement.appendChild(el("p", "error", reason));
    }
    content.parentElement.classList.remove("writing");
    asking = null;
    send.hidden = fresh.hidden = false;
    stop.hidden = true;
  });
  fresh.addEventListener("click", () => {
    messages.length = 0;
    list.replaceChildren();
    fresh.hidden = true;
    prompt.focus();
  });
  stop.addEventListener("click", () => asking?.abort());
  prompt.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    form.requestSubmit();
  });
}
