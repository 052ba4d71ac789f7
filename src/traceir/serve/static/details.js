// Everything that is known of a hit, in a dialog: picture, text, exact score, fields, and what to do with it.

import { showPicture } from "./api.js";
import { button, el, find, icon, openDialog, toast } from "./dom.js";
import { NOUNS } from "./query.js";

export class Details {
  // actions: {refine(hit), use(hit)}
  constructor(actions) {
    this.actions = actions;
    this.dialog = find("details");
    this.hits = [];
    this.place = 0;
    this.dialog.addEventListener("keydown", (event) => {
      if (event.key === "ArrowRight") this.turn(1);
      else if (event.key === "ArrowLeft") this.turn(-1);
    });
  }

  // `closed(place)`: called with the place of the hit shown last.
  open(hits, place, closed) {
    [this.hits, this.place] = [hits, place];
    this.draw();
    this.dialog.addEventListener("close", () => closed(this.place), { once: true });
    openDialog(this.dialog);
    this.dialog.querySelector("h2").focus();
  }

  turn(way) {
    const next = this.place + way;
    if (next < 0 || next >= this.hits.length) return;
    this.place = next;
    this.draw();
    this.dialog.querySelector("h2").focus();
  }

  draw() {
    const hit = this.hits[this.place];
    const act = (what) => () => { this.dialog.close(); what(hit); };
    const turner = (way, name, label) => el("button", { type: "button", class: "round", "aria-label": label,
      disabled: !this.hits[this.place + way], on: { click: () => this.turn(way) } }, icon(name));
    this.dialog.replaceChildren(
      el("header", {}, el("h2", { id: "details-title", tabindex: -1, text: `Hit ${hit.rank}` }),
        el("span", { class: "quiet", text: NOUNS[hit.modality] ?? hit.modality }),
        turner(-1, "back", "Previous hit"), turner(1, "forth", "Next hit"),
        el("button", { type: "button", class: "round", "data-close": true, "aria-label": "Close" }, icon("cross"))),
      el("div", { class: "leaf" }, hit.image ? pictureOf(hit) : null,
        el("div", { class: "about" },
          hit.text ? el("p", { class: "whole-text", dir: "auto", text: hit.text.slice(0, 20000) }) : null,
          el("dl", { class: "facts" }, ...factsOf(hit)))),
      el("footer", {}, button("Copy id", () => copy(hit.id), { class: "plain" }),
        button("Search with this", act(this.actions.use)),
        hit.image ? button("Now make it …", act(this.actions.refine), { class: "strong" }) : null));
  }
}

function pictureOf(hit) {
  const img = el("img", { alt: hit.text ? "" : `picture ${hit.id}` });
  const frame = el("div", { class: "frame" }, img);
  showPicture(img, hit.image, null, () => frame.replaceChildren(icon("picture"), el("span", { class: "quiet", text: "picture lost" })));
  return frame;
}

function factsOf(hit) {
  const facts = [["id", hit.id], ["score", String(hit.score)], ["rank", String(hit.rank)], ["modality", hit.modality]];
  for (const [name, value] of Object.entries(hit.fields ?? {})) {
    facts.push([name, value !== null && typeof value === "object" ? JSON.stringify(value) : String(value)]);
  }
  return facts.map(([name, value], place) => el("div", { class: place < 4 ? "own" : "field" },
    el("dt", { dir: "auto", text: name }), el("dd", { dir: "auto", text: value.slice(0, 20000) })));
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    toast("Copied.");
  } catch {
    toast("The browser does not let this page copy.");
  }
}
