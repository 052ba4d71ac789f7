// One search on the page: its road and its hits, or the state that stands in their place.

import { sayCut } from "./cutoff.js";
import { announce, button, el, plural, say } from "./dom.js";
import { NOUNS } from "./query.js";
import { Grid } from "./results.js";
import { Road } from "./reasoning.js";
import { PAGE, moves } from "./run.js";

export class Column {
  // actions: {open(run, place), refine(hit), retry(run), more(column), anything(query), compare()}
  constructor(run, { config, name, actions }) {
    this.run = run;
    this.actions = actions;
    this.road = new Road(run.query, { width: config.model?.width, count: config.count });
    this.grid = new Grid({ open: (place) => actions.open(run, place), refine: (hit) => actions.refine(hit) });
    this.count = el("p", { class: "count quiet" });
    this.compare = button("", () => actions.compare(), { class: "compare", "aria-keyshortcuts": "c", hidden: true });
    this.state = el("div", { class: "state", hidden: true });
    this.note = el("p", { class: "note", dir: "auto", hidden: true });
    this.more = button("More", () => actions.more(this), { class: "more", hidden: true });
    this.element = el("section", { class: "column", "aria-label": name },
      this.road.element,
      el("section", { class: "found", "aria-label": "Hits" },
        el("header", {}, el("h2", { text: "Hits" }), this.count, this.compare), this.state, this.note, this.grid.element, this.more));
  }

  // Brings everything up to the run. `other` is the run beside it, `tells` whether screen readers hear of it.
  update({ other = null, tells = true } = {}) {
    const { run } = this;
    this.road.silent = !tells;
    this.road.update(run);
    this.showState();
    const compared = other?.status === "done" ? other : null;
    if (run.status === "running" || run.status === "idle") this.wait();
    else if (run.hits.length) this.grid.show(run.hits, compared && moves(run.hits, compared.hits));
    else this.grid.clear();
    say(this.count, this.counted());
    this.note.hidden = !run.note;
    say(this.note, run.note ?? "");
    this.more.hidden = !run.more || run.status !== "done";
    this.more.disabled = run.paging;
    say(this.more, run.paging ? "Loading …" : "More hits");
    this.compare.hidden = other !== null || run.status !== "done";
    say(this.compare, `Compare ${run.route === "reason" ? "without" : "with"} reasoning`);
  }

  wait() {
    if (!this.grid.element.querySelector(".ghost")) this.grid.showWaiting(PAGE);
  }

  counted() {
    const { run } = this;
    if (run.status !== "done" || !run.hits.length) return "";
    const noun = NOUNS[run.query.modality] ?? "item";
    if (run.cut && !run.more) return `${plural(run.hits.length, noun)} above the cut-off, best first`;
    return run.more ? `the best ${plural(run.hits.length, noun)}` : `all ${plural(run.hits.length, noun)}, best first`;
  }

  showState() {
    const { run, actions } = this;
    const parts = [];
    if (run.status === "failed") {
      this.state.setAttribute("role", "alert");
      parts.push(el("h3", { text: titleOf(run.error) }), el("p", { dir: "auto", text: run.error.message }));
      if (run.error.retryAfter) parts.push(el("p", { class: "quiet", text: `Try again in ${Math.ceil(run.error.retryAfter)} s.` }));
      parts.push(button("Try again", () => actions.retry(run), { class: "strong" }));
    } else if (run.status === "stopped") {
      parts.push(el("h3", { text: "Stopped" }), el("p", { class: "quiet", text: "This search was stopped before the hits came." }),
        button("Search again", () => actions.retry(run), { class: "strong" }));
    } else if (run.status === "done" && !run.hits.length && typeof run.cut?.best === "number") {
      parts.push(el("h3", { text: "Nothing found" }), el("p", { class: "quiet", text: sayCut(run.cut) }),
        button("Show the nearest all the same", () => actions.retry(Object.assign(run, { cutoff: 0 }))));
    } else if (run.status === "done" && !run.hits.length) {
      parts.push(el("h3", { text: "No hits" }), el("p", { class: "quiet", text: run.query.modality
        ? `There is no ${NOUNS[run.query.modality]} in this collection that fits.` : "The collection is empty." }));
      if (run.query.modality) parts.push(button("Look for anything", () => actions.anything(run.query), { class: "strong" }));
    }
    if (run.status !== "failed") this.state.removeAttribute("role");
    const key = `${run.status} ${run.error?.message ?? ""} ${run.hits.length > 0}`;
    if (this.state.dataset.key === key) return;
    this.state.dataset.key = key;
    this.state.hidden = !parts.length;
    this.state.replaceChildren(...parts);
    if (run.status === "stopped" || (run.status === "done" && !run.hits.length)) announce(parts[0].textContent);
  }
}

function titleOf(error) {
  if (error.status === 0) return "No connection";
  if (error.status === 401) return "A key is needed";
  if (error.status === 403) return "This key may not search";
  if (error.status === 429) return "The server is busy";
  if (error.status === 503) return "The server is not ready";
  return error.status >= 500 ? "The search failed" : "The server refused this search";
}
