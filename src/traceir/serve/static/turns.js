// The turns of a search: each refinement hangs on the one before it. The trail shows the way to the current one and onwards.

import { el, find } from "./dom.js";
import { sayQuery } from "./query.js";
import { shownPicture } from "./reasoning.js";

export class Turns {
  // `go(turn)` is called when one is chosen.
  constructor(go) {
    this.go = go;
    this.all = new Map();
    this.trail = [];
    this.current = null;
    this.next = 1;
    find("back").addEventListener("click", () => this.step(-1));
    find("forth").addEventListener("click", () => this.step(1));
  }

  // A new turn behind `parent` (null: a new search); what lay ahead of the parent leaves the trail.
  add(query, parent, run) {
    // Entries of the browser's history outlive this page, so ids must not come again after a reload.
    const turn = { id: `${performance.timeOrigin}-${this.next++}`, query, parent, run, other: null };
    this.all.set(turn.id, turn);
    this.trail = [...this.pathTo(parent), turn];
    this.current = turn;
    return turn;
  }

  pathTo(turn) {
    const path = [];
    for (let at = turn; at; at = at.parent) path.unshift(at);
    return path;
  }

  // Makes a known turn the current one; the trail stays if it is on it.
  visit(turn) {
    if (!this.trail.includes(turn)) this.trail = this.pathTo(turn);
    this.current = turn;
  }

  step(way) {
    const next = this.trail[this.trail.indexOf(this.current) + way];
    if (next) this.go(next);
  }

  draw() {
    const at = this.trail.indexOf(this.current);
    find("trail").hidden = this.trail.length < 2;
    find("back").disabled = at <= 0;
    find("forth").disabled = at >= this.trail.length - 1;
    find("turns").replaceChildren(...this.trail.map((turn, place) => this.crumb(turn, place)));
    if (!find("trail").hidden) this.reveal(find("turns").children[at]);
  }

  // Scrolls the trail alone, never the page.
  reveal(crumb) {
    const list = find("turns");
    list.scrollLeft = crumb.offsetLeft - list.offsetLeft - (list.clientWidth - crumb.offsetWidth) / 2;
  }

  crumb(turn, place) {
    const img = turn.query.picture ? el("img", { alt: "", class: "thumb" }) : null;
    if (img) shownPicture(img, turn.query.picture);
    const words = turn.query.text || turn.query.instruction || sayQuery(turn.query);
    return el("li", {}, el("button", { type: "button", class: "crumb", "aria-current": turn === this.current ? "step" : null,
      title: words, on: { click: () => this.go(turn) } },
      el("span", { class: "unseen", text: `Turn ${place + 1}: ` }), img, el("span", { class: "crumb-words", dir: "auto", text: words })));
  }
}
