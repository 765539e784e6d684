// The feed of a live server. EventSource cannot send a key, so events are read from a fetch.

/** The key that a person gave, for as long as the tab lives. */
export const keys = {
  get: (name) => sessionStorage.getItem(`kunserve-${name}`) ?? "",
  set: (name, value) => sessionStorage.setItem(`kunserve-${name}`, value),
};

/** Headers of a request with that key, if there is one. */
export const bearer = (key) => (key ? { Authorization: `Bearer ${key}` } : {});

/** Yields [name, text] for each server-sent event of a response. */
export async function* eventsOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      let name = "message";
      const data = [];
      for (const line of part.split("\n")) {
        if (line.startsWith("event: ")) name = line.slice(7);
        if (line.startsWith("data: ")) data.push(line.slice(6));
      }
      yield [name, data.join("\n")];
    }
  }
}

/** What an error answer says, whatever its shape. */
export async function reasonOf(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `HTTP ${response.status}`;
  }
}
