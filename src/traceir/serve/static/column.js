// One search on the page: its road and its hits, or the state that stands in their place.

import { sayCut } from "./cutoff.js";
import { announce, button, el, plural, say } from "./dom.js";
import { NOUNS } from "./query.js";
import { Grid } from "./results.js";
import { Road } from "./reasoning.js";
import { PAGE, moves } from "./run.js";

const TITLES = { 0: "No connection", 401: "A key is needed", 403: "This key may not search", 429: "The server is busy", 503: "The server is not ready" };

export class Column {
  // actions: {open(run, place), refine(hit), retry(run), more(column), anything(query), compare()}
  constructor(run, { config, name, actions }) {
    this.run = run;
    this.actions = actions;
    this.road = new Road(run.query, { width: config.model?.width, count: config.count });
    this.grid = new Grid({ open: (place) => actions.open(run, place), refine: actions.refine });
    this.count = el("p", { class: "count quiet" });
    this.compare = button("", actions.compare, { class: "compare", "aria-keyshortcuts": "c", hidden: true });
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
    const { run, grid } = this;
    this.road.silent = !tells;
    this.road.update(run);
    this.showState();
    if (run.hits.length) grid.show(run.hits, other?.status === "done" ? moves(run.hits, other.hits) : null);
    else if (run.status !== "running" && run.status !== "idle") grid.clear();
    else if (!grid.element.querySelector(".ghost")) grid.showWaiting(PAGE);
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
    this.state.toggleAttribute("role", false);
    if (status === "failed") this.state.setAttribute("role", "alert");
    else if (parts.length) announce(parts[0].textContent);
    this.state.replaceChildren(...parts.filter(Boolean));
  }

  // What stands in the place of hits.
  stateOf() {
    const { run, actions } = this;
    const title = (text) => el("h3", { text });
    const told = (text) => el("p", { class: "quiet", text });
    const again = (text) => button(text, () => actions.retry(run), { class: "strong" });
    if (run.status === "failed") {
      const { status, message, retryAfter } = run.error;
      return [title(TITLES[status] ?? (status >= 500 ? "The search failed" : "The server refused this search")), el("p", { dir: "auto", text: message }),
        retryAfter && told(`Try again in ${Math.ceil(retryAfter)} s.`), again("Try again")];
    }
    if (run.status === "stopped") return [title("Stopped"), told("This search was stopped before the hits came."), again("Search again")];
    if (run.status !== "done" || run.hits.length) return [];
    if (typeof run.cut?.best === "number") {
      return [title("Nothing found"), told(sayCut(run.cut)),
        button("Show the nearest all the same", () => actions.retry(Object.assign(run, { cutoff: 0 })))];
    }
    const noun = NOUNS[run.query.modality];
    if (!noun) return [title("No hits"), told("The collection is empty.")];
    return [title("No hits"), told(`There is no ${noun} in this collection that fits.`),
      button("Look for anything", () => actions.anything(run.query), { class: "strong" })];
  }
}
