// The turns of a search: each refinement hangs on the one before it. The trail shows the way to the current one and onwards.

import { thumb } from "./api.js";
import { button, el, find, onClick } from "./dom.js";
import { sayQuery } from "./query.js";

export class Turns {
  all = new Map();
  trail = [];
  current = null;

  // `go(turn)` is called when one is chosen.
  constructor(go) {
    this.go = go;
    onClick("back", () => this.step(-1));
    onClick("forth", () => this.step(1));
  }

  // A new turn behind `parent` (null: a new search); what lay ahead of the parent leaves the trail.
  add(query, parent, run) {
    // Entries of the browser's history outlive this page, so ids must not come again after a reload.
    const turn = { id: `${performance.timeOrigin}-${this.all.size}`, query, parent, run, other: null };
    this.all.set(turn.id, turn);
    this.visit(turn);
    return turn;
  }

  // Makes a turn the current one; the trail stays if it is on it.
  visit(turn) {
    if (!this.trail.includes(turn)) {
      this.trail = [];
      for (let at = turn; at; at = at.parent) this.trail.unshift(at);
    }
    this.current = turn;
  }

  step(way) {
    const next = this.trail[this.trail.indexOf(this.current) + way];
    if (next) this.go(next);
  }

  draw() {
    const [list, at] = [find("turns"), this.trail.indexOf(this.current)];
    find("trail").hidden = this.trail.length < 2;
    find("back").disabled = at <= 0;
    find("forth").disabled = at >= this.trail.length - 1;
    list.replaceChildren(...this.trail.map((turn, place) => this.crumb(turn, place)));
    const crumb = list.children[at];
    // Scrolls the trail alone, never the page.
    if (crumb) list.scrollLeft = crumb.offsetLeft - list.offsetLeft - (list.clientWidth - crumb.offsetWidth) / 2;
  }

  crumb(turn, place) {
    const words = turn.query.text || turn.query.instruction || sayQuery(turn.query);
    const face = [el("span", { class: "unseen", text: `Turn ${place + 1}: ` }), thumb(turn.query.picture), el("span", { class: "crumb-words", dir: "auto", text: words })];
    return el("li", {}, button(face, () => this.go(turn), { class: "crumb", "aria-current": turn === this.current ? "step" : null, title: words }));
  }
}
