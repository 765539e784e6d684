// Making and changing elements. Text is only ever set as text, so nothing that a user or a model wrote becomes HTML.

/** A new element with a class, text and attributes. */
export function el(tag, className = "", text = "", attributes = {}) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text) element.textContent = text;
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
}

/** The element of that id. */
export const byId = (id) => document.getElementById(id);

/** Set text only where it changed: a screen reader need not hear it again. */
export function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** Bytes as people read them. */
export function bytes(count) {
  const mib = count / 2 ** 20;
  if (mib >= 10240) return `${(mib / 1024).toFixed(1)} GiB`;
  return mib >= 10 || mib === 0 ? `${Math.round(mib)} MiB` : `${mib.toFixed(1)} MiB`;
}

/** Seconds as people read them. */
export function seconds(value) {
  if (value < 0.0095) return `${(value * 1000).toFixed(1)} ms`;
  return value < 1 ? `${Math.round(value * 1000)} ms` : `${value.toFixed(value < 10 ? 2 : 1)} s`;
}

/** A whole number with separators. */
export const count = (value) => Math.round(value).toLocaleString("en");

/** 83 to 1:23. */
export function clock(value) {
  const whole = Math.max(0, Math.floor(value));
  return `${Math.floor(whole / 60)}:${String(whole % 60).padStart(2, "0")}`;
}

/** Ranges [[0, 15]] of layers as "0–14". */
export const layers = (runs) => runs.map(([a, b]) => (b - a > 1 ? `${a}–${b - 1}` : `${a}`)).join(", ");
