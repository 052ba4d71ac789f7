// One search on the page: how it was taken and its hits, or the state that stands in their place; and two routes of one query side by side.

import { announce, button, el, plural, say, sayRate, seconds } from "./dom.js";
import { NOUNS } from "./query.js";
import { TracePanel } from "./reasoning.js";
import { Grid } from "./results.js";
import { PAGE, moves } from "./run.js";

const TITLES = { 0: "No connection", 401: "A key is needed", 403: "This key may not search", 429: "The server is busy", 503: "The server is not ready" };
const LEGEND = [["▲", "up", "higher here than on the other route"], ["▼", "down", "lower here"], ["=", "", "the same place"],
  ["only here", "new", "not among the other's hits"]];

export class Column {
  // actions: {open(run, place), refine(hit), retry(run), more(column), anything(query), compare()}
  constructor(run, { config, name, actions }) {
    this.run = run;
    this.actions = actions;
    this.trace = new TracePanel(run.query, { width: config.model?.width, count: config.count });
    this.grid = new Grid({ open: (place) => actions.open(run, place), refine: actions.refine });
    this.count = el("p", { class: "count quiet" });
    this.compare = button("", actions.compare, { class: "compare", "aria-keyshortcuts": "c", hidden: true });
    this.state = el("div", { class: "state", hidden: true });
    this.note = el("p", { class: "note", dir: "auto", hidden: true });
    this.more = button("More", () => actions.more(this), { class: "more", hidden: true });
    this.element = el("section", { class: "column", "aria-label": name },
      this.trace.element,
      el("section", { class: "found", "aria-label": "Hits" },
        el("header", {}, el("h2", { text: "Hits" }), this.count, this.compare), this.state, this.note, this.grid.element, this.more));
  }

  // Brings everything up to the run. `other` is the run beside it, `tells` whether screen readers hear of it.
  update({ other = null, tells = true } = {}) {
    const { run, grid } = this;
    this.trace.silent = !tells;
    this.trace.update(run);
    this.showState();
    if (run.hits.length) grid.show(run.hits, other?.status === "done" ? moves(run.hits, other.hits) : null);
    else if (run.status !== "running" && run.status !== "idle") grid.clear();
    else grid.showWaiting(PAGE);
    say(this.count, this.counted());
    this.note.hidden = !run.note;
    say(this.note, run.note ?? "");
    this.more.hidden = !run.more || run.status !== "done";
    this.more.disabled = run.paging;
    say(this.more, run.paging ? "Loading …" : "More hits");
    this.compare.hidden = other !== null || run.status !== "done";
    say(this.compare, `Compare ${run.route === "reason" ? "without" : "with"} reasoning`);
  }

  counted() {
    const { run } = this;
    if (run.status !== "done" || !run.hits.length) return "";
    const count = plural(run.hits.length, NOUNS[run.query.modality] ?? "item");
    if (run.more) return `the best ${count}`;
    return run.cut ? `${count} above the cut-off, best first` : `all ${count}, best first`;
  }

  showState() {
    const { status, error, hits } = this.run;
    const key = `${status} ${error?.message ?? ""} ${hits.length > 0}`;
    if (this.state.dataset.key === key) return;
    const parts = this.stateOf();
    this.state.dataset.key = key;
    this.state.hidden = !parts.length;
    this.state.role = status === "failed" ? "alert" : null;
    if (status !== "failed" && parts.length) announce(parts[0].textContent);
    this.state.replaceChildren(...parts.filter(Boolean));
  }

  // What stands in the place of hits.
  stateOf() {
    const { run, actions } = this;
    const says = (title, text, ...more) => [el("h3", { text: title }), text && el("p", { class: "quiet", text }), ...more];
    const again = (text) => button(text, () => actions.retry(run), { class: "strong" });
    if (run.status === "failed") {
      const { status, message, retryAfter } = run.error;
      return says(TITLES[status] ?? (status >= 500 ? "The search failed" : "The server refused this search"), "", el("p", { dir: "auto", text: message }),
        retryAfter && el("p", { class: "quiet", text: `Try again in ${Math.ceil(retryAfter)} s.` }), again("Try again"));
    }
    if (run.status === "stopped") return says("Stopped", "This search was stopped before the hits came.", again("Search again"));
    if (run.status !== "done" || run.hits.length) return [];
    if (typeof run.cut?.best === "number") {
      return says("Nothing found", sayCut(run.cut),
        button("Show the nearest all the same", () => actions.retry(Object.assign(run, { cutoff: 0 }))));
    }
    const noun = NOUNS[run.query.modality];
    if (!noun) return says("No hits", "The collection is empty.");
    return says("No hits", `There is no ${noun} in this collection that fits.`,
      button("Look for anything", () => actions.anything(run.query), { class: "strong" }));
  }
}

// Why nothing is shown, for the `cutoff` of an answer.
const sayCut = (cut) =>
  `Nothing here scores better than what ${sayRate(cut.rate)} queries find whose answer is not in the collection. The nearest scores ${cut.best.toFixed(2)}.`;

// The line above two columns: what the routes agree on, what moved, and what reasoning cost. `leave` ends the comparison.
export function drawVerdict(verdict, mine, other, leave) {
  if (verdict.hidden || !verdict.firstChild) {
    const legend = LEGEND.map(([sign, kind, words]) => el("span", {}, el("span", { class: `move ${kind}`, text: sign }), ` ${words}`));
    verdict.replaceChildren(el("p", { role: "status" }), button("End the comparison", leave, { "aria-keyshortcuts": "Escape" }),
      el("p", { class: "legend quiet" }, ...legend));
  }
  verdict.hidden = false;
  const text = el("p", {}, ...(mine.status === "done" && other.status === "done" ? compared(mine, other) : ["Comparing the two routes …"]));
  if (verdict.firstChild.textContent !== text.textContent) verdict.firstChild.replaceChildren(...text.childNodes);
}

function compared(mine, other) {
  const [first, second] = [mine.hits, other.hits];
  const shared = [...moves(first, second).values()].filter((move) => move !== null);
  const kept = shared.filter((move) => move === 0).length;
  const same = first.length > 0 && first[0].id === second[0]?.id;
  return [el("b", { text: same ? "Both routes find the same first hit." : "The routes disagree on the first hit." }),
    ` They share ${shared.length} of ${Math.max(first.length, second.length)}: ${kept} in the same place, ${shared.length - kept} moved.`,
    costOf(...(mine.route === "reason" ? [mine, other] : [other, mine]))];
}

function costOf(reasoned, direct) {
  if (reasoned.route === direct.route) return ` Both took the ${direct.route} route.`;
  const more = (reasoned.trace.seconds?.encode ?? NaN) - (direct.trace.seconds?.encode ?? NaN);
  const fresh = !reasoned.trace.cached && !direct.trace.cached && more > 0;
  return ` Reasoning cost ${plural(reasoned.trace.tokens ?? 0, "token")}${fresh ? ` and ${seconds(more)}` : ""}.`;
}

// While a hit is pointed at or has the focus, the same hit in the other column is marked.
export function linkTwins(columns) {
  const mark = (event) => {
    const card = event.type === "focusout" ? null : event.target.closest(".card[data-id]");
    for (const other of columns.querySelectorAll(".card")) other.classList.toggle("twin", Boolean(card) && other !== card && other.dataset.id === card.dataset.id);
  };
  for (const kind of ["pointerover", "pointerleave", "focusin", "focusout"]) columns.addEventListener(kind, mark);
}
