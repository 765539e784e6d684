// What charts draw: a column of numbers per figure, one row per frame. null where there was nothing to measure.
import { tokens } from "./frame.js";

const MEAN_S = 3; // of tokens per second: steps of a large batch come seldom, and would make a saw of it

export const COLUMNS = ["at", "room", "used", "waiting", "running", "p50", "p99", "gap", "tok"];

export class History {
  /** Rows older than `keepS` seconds go. */
  constructor(keepS = Infinity) {
    this.keepS = keepS;
    this.clear();
  }

  clear() {
    this.columns = Object.fromEntries(COLUMNS.map((name) => [name, []]));
    this.speeds = []; // of the last MEAN_S: when, tokens per second
    this.startS = null; // of the first frame, on the engine's clock: charts count from here
  }

  /** Add a row of a frame. A server that was started anew begins a new history. */
  push(frame) {
    if (this.startS === null || frame.at_s < this.startS) {
      this.clear();
      this.startS = frame.at_s;
    }
    const { at } = this.columns;
    const now = frame.at_s - this.startS;
    if (at.length && at[at.length - 1] >= now) return;
    const { room, used } = tokens(frame);
    const rates = frame.rates;
    const isOld = rates.ttft_at_s !== undefined; // no first token in this window: what is known is of one before
    const row = {
      at: now, room, used,
      waiting: frame.requests.waiting, running: frame.requests.running,
      p50: isOld ? null : (rates.ttft_p50_s ?? null), p99: isOld ? null : (rates.ttft_p99_s ?? null),
      gap: rates.gap_s ?? null, tok: this.meanSpeed(now, rates.tok_s),
    };
    for (const name of COLUMNS) this.columns[name].push(row[name]);
    let old = 0;
    while (now - at[old] > this.keepS) old++;
    if (old > 50) for (const name of COLUMNS) this.columns[name].splice(0, old);
  }
  meanSpeed(now, speed) {
    this.speeds.push([now, speed]);
    while (now - this.speeds[0][0] >= MEAN_S) this.speeds.shift();
    return this.speeds.reduce((sum, [, value]) => sum + value, 0) / this.speeds.length;
  }
}
