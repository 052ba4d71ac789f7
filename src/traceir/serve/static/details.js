// Everything that is known of a hit, in a dialog: picture, text, exact score, fields, and what to do with it.

import { button, el, find, icon, openDialog, toast } from "./dom.js";
import { NOUNS } from "./query.js";
import { framed } from "./results.js";

const LONGEST = 20000; // characters of a text that are shown

export class Details {
  // actions: {refine(hit), use(hit)}
  constructor(actions) {
    this.actions = actions;
    this.dialog = find("details");
    this.dialog.addEventListener("keydown", ({ key }) => {
      if (key === "ArrowRight" || key === "ArrowLeft") this.show(this.place + (key === "ArrowRight" ? 1 : -1));
    });
  }

  // `closed(place)`: called with the place of the hit shown last.
  open(hits, place, closed) {
    this.hits = hits;
    this.dialog.addEventListener("close", () => closed(this.place), { once: true });
    this.show(place);
  }

  show(place) {
    const hit = this.hits[place];
    if (!hit) return;
    this.place = place;
    const act = (what) => () => { this.dialog.close(); what(hit); };
    const turner = (way, name, label) => el("button", { type: "button", class: "round", "aria-label": label,
      disabled: !this.hits[place + way], on: { click: () => this.show(place + way) } }, icon(name));
    this.dialog.replaceChildren(
      el("header", {}, el("h2", { id: "details-title", tabindex: -1, text: `Hit ${hit.rank}` }),
        el("span", { class: "quiet", text: NOUNS[hit.modality] ?? hit.modality }),
        turner(-1, "back", "Previous hit"), turner(1, "forth", "Next hit"),
        el("button", { type: "button", class: "round", "data-close": true, "aria-label": "Close" }, icon("cross"))),
      el("div", { class: "leaf" }, hit.image && framed("div", hit),
        el("div", { class: "about" }, hit.text && el("p", { class: "whole-text", dir: "auto", text: hit.text.slice(0, LONGEST) }),
          el("dl", { class: "facts" }, ...factsOf(hit)))),
      el("footer", {}, button("Copy id", () => copy(hit.id), { class: "plain" }), button("Search with this", act(this.actions.use)),
        hit.image && button("Now make it …", act(this.actions.refine), { class: "strong" })));
    openDialog(this.dialog);
    this.dialog.querySelector("h2").focus();
  }
}

function factsOf({ id, score, rank, modality, fields }) {
  const facts = [...Object.entries({ id, score, rank, modality }), ...Object.entries(fields ?? {})];
  const shown = (value) => (typeof value === "string" ? value : JSON.stringify(value)).slice(0, LONGEST);
  return facts.map(([name, value]) => el("div", {}, el("dt", { dir: "auto", text: name }), el("dd", { dir: "auto", text: shown(value) })));
}

function copy(text) {
  navigator.clipboard.writeText(text).then(() => toast("Copied."), () => toast("The browser does not let this page copy."));
}
