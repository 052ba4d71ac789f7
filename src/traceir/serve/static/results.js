// Hits as a grid of cards, and all that is known of one in a dialog. Arrows move among the cards, Enter opens one, R takes it further.

import { showPicture } from "./api.js";
import { button, el, find, fixed, icon, openDialog, plural, toast } from "./dom.js";
import { NOUNS } from "./query.js";

const LONGEST = 20000; // characters of a text in the dialog
export const DRAGGED = "application/x-traceir-item";

export class Grid {
  cards = [];

  // actions: {open(place), refine(hit)}
  constructor(actions) {
    this.actions = actions;
    this.element = el("ol", { class: "grid", role: "list", "aria-label": "Hits, best first", on: {
      keydown: (event) => this.onKey(event), focusin: (event) => this.setStop(this.placeOf(event.target)) } });
  }

  clear() {
    this.cards = [];
    this.element.replaceChildren();
    this.element.removeAttribute("aria-busy");
  }

  // Places that will be filled.
  showWaiting(count) {
    if (this.element.querySelector(".ghost")) return;
    this.clear();
    this.element.setAttribute("aria-busy", "true");
    this.element.append(...Array.from({ length: count }, () => el("li", { class: "card ghost", "aria-hidden": "true" })));
  }

  // Shows hits; those that are there already stay as they are. `moved`: as `moves` of run.js says, or null.
  show(hits, moved = null) {
    if (this.element.querySelector(".ghost")) this.clear();
    for (const hit of hits.slice(this.cards.length)) {
      this.cards.push(makeCard(hit, this.cards.length, this.actions));
      this.element.append(this.cards.at(-1).element);
    }
    this.setStop(Math.max(0, this.cards.findIndex((card) => card.opener.tabIndex === 0)));
    for (const card of this.cards) markMove(card, moved ? moved.get(card.hit.id) : undefined);
  }

  focus(place) {
    this.cards[place]?.opener.focus();
  }

  placeOf(target) {
    return this.cards.findIndex((card) => card.element.contains(target));
  }

  // Tab stops at this card and its button alone; the arrows go on from there.
  setStop(stop) {
    this.cards.forEach(({ opener, refine }, place) => {
      for (const control of [opener, refine]) if (control) control.tabIndex = place === stop ? 0 : -1;
    });
  }

  onKey(event) {
    const place = this.placeOf(event.target);
    if (event.ctrlKey || event.metaKey || event.altKey || place < 0) return;
    const { hit } = this.cards[place];
    const next = this.neighbour(place, event.key);
    if (next === null && event.key.toLowerCase() !== "r") return;
    event.preventDefault();
    if (next === null) {
      if (hit.image) this.actions.refine(hit);
      return;
    }
    this.focus(next);
    this.cards[next].element.scrollIntoView({ block: "nearest" });
  }

  neighbour(place, key) {
    const last = this.cards.length - 1;
    const ways = { ArrowRight: Math.min(place + 1, last), ArrowLeft: Math.max(place - 1, 0), Home: 0, End: last };
    if (key === "ArrowDown" || key === "ArrowUp") return this.above(place, key === "ArrowDown" ? 1 : -1);
    return ways[key] ?? null;
  }

  // The nearest card of the next row, by what is seen.
  above(place, way) {
    const boxes = this.cards.map((card, at) => ({ at, box: card.element.getBoundingClientRect() }));
    const here = boxes[place].box;
    const others = boxes.filter(({ box }) => (box.top - here.top) * way > 4);
    const row = Math.min(...others.map(({ box }) => box.top * way)) * way;
    const off = ({ box }) => Math.abs(box.left + box.width / 2 - here.left - here.width / 2);
    const near = others.filter(({ box }) => Math.abs(box.top - row) <= 4).sort((first, second) => off(first) - off(second));
    return near[0]?.at ?? place;
  }
}

function makeCard(hit, place, actions) {
  const move = el("span", { class: "move", hidden: true });
  const foot = el("span", { class: "foot" },
    el("span", { class: "rank number", text: hit.rank }), move, el("span", { class: "score number", text: fixed(hit.score) }));
  const opener = button([...faceOf(hit), foot], () => actions.open(place), { class: "opener", tabindex: -1 });
  const bar = el("span", { class: "bar", "aria-hidden": "true" });
  bar.style.setProperty("--part", String(Math.min(1, Math.max(0, hit.score))));
  const refine = hit.image && button("now make it …", () => actions.refine(hit),
    { class: "refine", tabindex: -1, "aria-label": `Now make it … with hit ${hit.rank}` });
  const element = el("li", { class: `card ${hit.image ? (hit.text ? "pair" : "image") : "text"}`, data: { id: hit.id },
    draggable: hit.image ? "true" : null, on: { dragstart: (event) => event.dataTransfer?.setData(DRAGGED, hit.id) } }, opener, bar, refine);
  return { element, opener, refine, move, hit };
}

function faceOf(hit) {
  const text = hit.text?.slice(0, 600);
  return [hit.image && framed("span", hit, 512), text && el("span", { class: "caption", dir: "auto", text }),
    !hit.image && !text && el("span", { class: "caption quiet", text: hit.id })];
}

// A hit's picture in a frame, or what stands there where it is lost.
function framed(tag, hit, side = null) {
  const img = el("img", { alt: hit.text ? "" : `picture ${hit.id}`, decoding: "async", draggable: "false" });
  const frame = el(tag, { class: "frame" }, img);
  showPicture(img, hit.image, side, () => frame.replaceChildren(icon("picture"), el("span", { class: "quiet", text: "picture lost" })));
  return frame;
}

// `by`: places that it is higher than on the other route; null where it is not there, undefined without another route.
function markMove({ move, element, opener, hit }, by) {
  let [kind, sign, words] = ["same", "=", "same place on the other route"];
  if (by === null) [kind, sign, words] = ["new", "only here", "not among the hits of the other route"];
  else if (by > 0) [kind, sign, words] = ["up", `▲ ${by}`, `${plural(by, "place")} higher than on the other route`];
  else if (by < 0) [kind, sign, words] = ["down", `▼ ${-by}`, `${plural(-by, "place")} lower than on the other route`];
  move.hidden = by === undefined;
  if (by === undefined) delete element.dataset.move;
  else element.dataset.move = kind;
  Object.assign(move, { className: `move ${kind}`, textContent: sign, title: words });
  const name = [`Hit ${hit.rank}`, `score ${fixed(hit.score)}`, by === undefined ? "" : words,
    `${NOUNS[hit.modality] ?? "item"}: ${hit.text ? hit.text.slice(0, 200) : hit.id}`];
  opener.setAttribute("aria-label", name.filter(Boolean).join(", "));
}

// The dialog of a hit: picture, text, exact score, fields, and what to do with it.
export class Details {
  dialog = find("details");

  // actions: {refine(hit), use(hit)}
  constructor(actions) {
    this.actions = actions;
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
    const round = (name, label, attributes, onclick) => button(icon(name), onclick, { class: "round", "aria-label": label, ...attributes });
    const turner = (way, name, label) => round(name, label, { disabled: !this.hits[place + way] }, () => this.show(place + way));
    this.dialog.replaceChildren(
      el("header", {}, el("h2", { id: "details-title", tabindex: -1, text: `Hit ${hit.rank}` }),
        el("span", { class: "quiet", text: NOUNS[hit.modality] ?? hit.modality }),
        turner(-1, "back", "Previous hit"), turner(1, "forth", "Next hit"), round("cross", "Close", { "data-close": true })),
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
