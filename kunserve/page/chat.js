// A conversation with the model, streamed.
import { byId, el } from "./dom.js";
import { bearer, eventsOf, keys, reasonOf } from "./feed.js";

/** The chat box. `model()` names the model that is asked. */
export function startChat(model) {
  const [form, prompt, list, send, stop] = ["chat-form", "prompt", "messages", "send", "stop"].map(byId);
  const messages = [];
  let asking = null;

  function add(role, text) {
    const item = list.appendChild(el("li", `message ${role}`));
    item.appendChild(el("b", "", role === "user" ? "You" : "Model"));
    const content = item.appendChild(el("p", "", text));
    list.scrollTop = list.scrollHeight;
    return content;
  }

  async function answer(content) {
    const body = JSON.stringify({ model: model(), messages, stream: true });
    const headers = { "Content-Type": "application/json", ...bearer(keys.get("api")) };
    const response = await fetch("/v1/chat/completions", { method: "POST", headers, body, signal: asking.signal });
    if (!response.ok) throw new Error(await reasonOf(response));
    for await (const [, data] of eventsOf(response)) {
      if (data === "[DONE]") break;
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message);
      content.textContent += event.choices[0]?.delta?.content ?? "";
      list.scrollTop = list.scrollHeight;
    }
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
    send.hidden = true;
    stop.hidden = false;
    content.parentElement.classList.add("writing");
    try {
      await answer(content);
      messages.push({ role: "assistant", content: content.textContent });
    } catch (error) {
      messages.pop();
      const reason = error.name === "AbortError" ? "stopped" : error.message;
      content.parentElement.appendChild(el("p", "error", reason));
    }
    content.parentElement.classList.remove("writing");
    asking = null;
    send.hidden = false;
    stop.hidden = true;
  });
  stop.addEventListener("click", () => asking?.abort());
  prompt.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    form.requestSubmit();
  });
}
