// A frame is what is seen of a server at one moment (kunserve/observe/frame.py); a delta is a JSON merge patch of it.

/** Change `frame` as `delta` says. */
export function apply(frame, delta) {
  for (const [name, value] of Object.entries(delta)) {
    if (value === null) {
      delete frame[name];
    } else if (typeof value === "object" && !Array.isArray(value)) {
      if (typeof frame[name] !== "object" || Array.isArray(frame[name])) frame[name] = {};
      apply(frame[name], value);
    } else {
      frame[name] = value;
    }
  }
}

/** Indices in half-open runs [[0, 3]]. */
export function indices(runs) {
  const all = [];
  for (const [first, last] of runs) for (let i = first; i < last; i++) all.push(i);
  return all;
}

/** Tokens that KV has room for, and those that are in use, over all groups. */
export function tokens(frame) {
  let room = 0;
  let used = 0;
  for (const group of Object.values(frame.groups)) {
    room += group.blocks * frame.block_size;
    used += group.used * frame.block_size;
  }
  return { room, used };
}

const GIVEN_UP = "holds nothing and belongs to no group";

/** What the states of a device but "ok" are called, and what they mean. */
export const STATES = {
  suspect: ["⚠ suspect", "It failed several times or is overdue: it gets no new requests while others can take them"],
  lost: ["✕ lost", `It was declared dead after failures: it ${GIVEN_UP}`],
  removed: ["− removed", `An operator took it out of service: it ${GIVEN_UP}`],
};

/** The state of a device; recordings of before have none. */
export const stateOf = (device) => device.state ?? "ok";

/** Whether a device is no part of the server any more. */
export const isGone = (device) => ["lost", "removed"].includes(stateOf(device));

/** Chunks of weights that were dropped and are not back, over all devices that serve. */
export function droppedChunks(frame) {
  const sizes = Object.values(frame.units);
  let chunks = 0;
  for (const device of Object.values(frame.devices)) {
    if (isGone(device)) continue;
    const here = new Set(indices(device.units));
    for (const unit of indices(device.home)) if (!here.has(unit)) chunks += sizes[unit];
  }
  return chunks;
}

const KINDS = {
  drop: ["▼", "drop"],
  restore: ["▲", "restore"],
  rebalance: ["⇆", "rebalance"],
  lose: ["†", "device loss"],
  remove: ["−", "device removal"],
  add: ["+", "device addition"],
};

/** The sign and the words for a kind of transition. */
export const kindOf = (kind) => KINDS[kind] ?? ["◆", kind];

/**
 * What is marked of a transition at `nowS`, by charts and in the list alike: when the new groups were live (or when it
 * ended without), what it was, how long it was prepared and when KV moved. Times on the engine's clock.
 */
export function markOf(transition, nowS) {
  const { started_s: startedS, seconds, kind, outcome } = transition;
  const isCommitted = seconds.committed !== undefined;
  const isPreparing = outcome === "running" && !isCommitted;
  const at = isPreparing ? nowS : startedS + (isCommitted ? seconds.committed : (seconds.total ?? 0));
  const [mark, words] = kindOf(kind);
  const sign = isCommitted || isPreparing ? mark : "✕";
  const label = [sign, words, ...(isPreparing ? ["…"] : isCommitted ? [] : [outcome])].join(" ");
  const exchanged = isCommitted && transition.exchange_bytes > 0 ? [at, at + (seconds.exchange ?? 0)] : null;
  return { at, kind, label, isPreparing, prepared: [startedS, at], exchanged };
}

/** Transitions of a frame, oldest first. */
export const transitionsOf = (frame) =>
  Object.values(frame.transitions).sort((a, b) => a.started_s - b.started_s);
