// Hits as a grid of cards: pictures, texts, and both for pairs. Arrows move among them, Enter opens one, R takes it further.

import { el, fixed, icon, plural } from "./dom.js";
import { showPicture } from "./api.js";
import { NOUNS } from "./query.js";

export const DRAGGED = "application/x-traceir-item";

export class Grid {
  // actions: {open(place), refine(hit)}
  constructor(actions) {
    this.actions = actions;
    this.cards = [];
    this.element = el("ol", { class: "grid", role: "list", "aria-label": "Hits, best first" });
    this.element.addEventListener("keydown", (event) => this.onKey(event));
    this.element.addEventListener("focusin", (event) => this.keepStop(event.target));
  }

  clear() {
    this.cards = [];
    this.element.replaceChildren();
  }

  // Places that will be filled.
  showWaiting(count) {
    this.clear();
    this.element.setAttribute("aria-busy", "true");
    this.element.append(...Array.from({ length: count }, () => el("li", { class: "card ghost", "aria-hidden": "true" })));
  }

  // Shows hits; those that are there already stay as they are. `moved`: as `moves` of run.js says, or null.
  show(hits, moved = null) {
    if (this.element.querySelector(".ghost")) this.clear();
    this.element.removeAttribute("aria-busy");
    hits.slice(this.cards.length).forEach((hit) => {
      const card = makeCard(hit, this.cards.length, this.actions);
      this.cards.push(card);
      this.element.append(card.element);
    });
    const stop = this.stop();
    this.cards.forEach((card, place) => {
      setStop(card, place === stop);
      markMove(card, moved ? moved.get(card.hit.id) : undefined);
    });
  }

  // The place of the one card that Tab reaches.
  stop() {
    return Math.max(0, this.cards.findIndex((card) => card.opener.tabIndex === 0));
  }

  focus(place = 0) {
    this.cards[place]?.opener.focus();
  }

  keepStop(target) {
    const current = this.cards.find((card) => card.element.contains(target));
    if (current) for (const card of this.cards) setStop(card, card === current);
  }

  onKey(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const place = this.cards.findIndex((card) => card.element.contains(event.target));
    if (place < 0) return;
    if (event.key === "r" || event.key === "R") {
      event.preventDefault();
      if (this.cards[place].hit.image) this.actions.refine(this.cards[place].hit);
      return;
    }
    const next = this.neighbour(place, event.key);
    if (next === null) return;
    event.preventDefault();
    this.focus(next);
    this.cards[next].element.scrollIntoView({ block: "nearest" });
  }

  neighbour(place, key) {
    const last = this.cards.length - 1;
    if (key === "ArrowRight") return Math.min(place + 1, last);
    if (key === "ArrowLeft") return Math.max(place - 1, 0);
    if (key === "Home") return 0;
    if (key === "End") return last;
    if (key === "ArrowDown" || key === "ArrowUp") return this.above(place, key === "ArrowDown" ? 1 : -1);
    return null;
  }

  // The nearest card of the next row, by what is seen.
  above(place, way) {
    const boxes = this.cards.map((card) => card.element.getBoundingClientRect());
    const here = boxes[place];
    const others = boxes.map((box, at) => ({ at, box })).filter(({ box }) => (box.top - here.top) * way > 4);
    if (!others.length) return place;
    const middle = here.left + here.width / 2;
    const row = others.reduce((best, one) => ((one.box.top - best.box.top) * way < 0 ? one : best)).box.top;
    const near = others.filter(({ box }) => Math.abs(box.top - row) <= 4);
    const off = ({ box }) => Math.abs(box.left + box.width / 2 - middle);
    return near.reduce((best, one) => (off(one) < off(best) ? one : best)).at;
  }
}

function makeCard(hit, place, actions) {
  const move = el("span", { class: "move", hidden: true });
  const opener = el("button", { type: "button", class: "opener", tabindex: -1, on: { click: () => actions.open(place) } },
    ...faceOf(hit),
    el("span", { class: "foot" },
      el("span", { class: "rank number", text: hit.rank }), move, el("span", { class: "score number", text: fixed(hit.score) })));
  const bar = el("span", { class: "bar", "aria-hidden": "true" });
  bar.style.setProperty("--part", String(Math.min(1, Math.max(0, hit.score))));
  const element = el("li", { class: `card ${hit.image ? (hit.text ? "pair" : "image") : "text"}`, data: { id: hit.id } }, opener, bar);
  const refine = hit.image && el("button", { type: "button", class: "refine", tabindex: -1, "aria-label": `Now make it … with hit ${hit.rank}`,
    on: { click: () => actions.refine(hit) } }, "now make it …");
  if (refine) {
    element.append(refine);
    element.draggable = true;
    element.addEventListener("dragstart", (event) => event.dataTransfer?.setData(DRAGGED, hit.id));
  }
  return { element, opener, refine, move, hit };
}

// Whether Tab stops at this card and its button; the arrows go on from there.
function setStop(card, here) {
  card.opener.tabIndex = here ? 0 : -1;
  if (card.refine) card.refine.tabIndex = here ? 0 : -1;
}

function nameOf(hit, moved) {
  const what = hit.text ? hit.text.slice(0, 200) : hit.id;
  return [`Hit ${hit.rank}`, `score ${fixed(hit.score)}`, moved, `${NOUNS[hit.modality] ?? "item"}: ${what}`].filter(Boolean).join(", ");
}

function faceOf(hit) {
  const face = [];
  if (hit.image) {
    const frame = el("span", { class: "frame" });
    const img = el("img", { alt: hit.text ? "" : `picture ${hit.id}`, decoding: "async", props: { draggable: false } });
    showPicture(img, hit.image, 512, () => frame.replaceChildren(icon("picture"), el("span", { class: "quiet", text: "picture lost" })));
    frame.append(img);
    face.push(frame);
  }
  if (hit.text) face.push(el("span", { class: "caption", dir: "auto", text: hit.text.slice(0, 600) }));
  if (!face.length) face.push(el("span", { class: "caption quiet", text: hit.id }));
  return face;
}

function markMove(card, move) {
  const { move: mark, element, opener, hit } = card;
  mark.hidden = move === undefined;
  delete element.dataset.move;
  opener.setAttribute("aria-label", nameOf(hit, ""));
  if (move === undefined) return;
  let [kind, sign, words] = ["same", "=", "same place on the other route"];
  if (move === null) [kind, sign, words] = ["new", "only here", "not among the hits of the other route"];
  else if (move > 0) [kind, sign, words] = ["up", `▲ ${move}`, `${plural(move, "place")} higher than on the other route`];
  else if (move < 0) [kind, sign, words] = ["down", `▼ ${-move}`, `${plural(-move, "place")} lower than on the other route`];
  element.dataset.move = kind;
  mark.className = `move ${kind}`;
  mark.textContent = sign;
  mark.title = words;
  opener.setAttribute("aria-label", nameOf(hit, words));
}
