// What charts draw: a column of numbers per figure, one row per frame. null where there was nothing to measure.
import { tokens } from "./frame.js";

export const COLUMNS = ["at", "room", "used", "waiting", "running", "p50", "p99", "gap", "tok"];

export class History {
  /** Rows older than `keepS` seconds go. */
  constructor(keepS = Infinity) {
    this.keepS = keepS;
    this.clear();
  }

  clear() {
    this.columns = Object.fromEntries(COLUMNS.map((name) => [name, []]));
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
    const row = {
      at: now, room, used,
      waiting: frame.requests.waiting, running: frame.requests.running,
      p50: rates.ttft_p50_s ?? null, p99: rates.ttft_p99_s ?? null, gap: rates.gap_s ?? null, tok: rates.tok_s,
    };
    for (const name of COLUMNS) this.columns[name].push(row[name]);
    let old = 0;
    while (now - at[old] > this.keepS) old++;
    if (old > 50) for (const name of COLUMNS) this.columns[name].splice(0, old);
  }
}
