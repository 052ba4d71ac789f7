// Hits as a grid of cards: pictures, texts, and both for pairs. Arrows move among them, Enter opens one, R takes it further.

import { el, fixed, icon, plural } from "./dom.js";
import { showPicture } from "./api.js";
import { NOUNS } from "./query.js";

export const DRAGGED = "application/x-traceir-item";

export class Grid {
  cards = [];

  // actions: {open(place), refine(hit)}
  constructor(actions) {
    this.actions = actions;
    this.element = el("ol", { class: "grid", role: "list", "aria-label": "Hits, best first", on: {
      keydown: (event) => this.onKey(event), focusin: (event) => this.keepStop(event.target) } });
  }

  clear() {
    this.cards = [];
    this.element.replaceChildren();
    this.element.removeAttribute("aria-busy");
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
    for (const hit of hits.slice(this.cards.length)) {
      this.cards.push(makeCard(hit, this.cards.length, this.actions));
      this.element.append(this.cards.at(-1).element);
    }
    // Tab reaches one card.
    const stop = Math.max(0, this.cards.findIndex((card) => card.opener.tabIndex === 0));
    this.cards.forEach((card, place) => {
      setStop(card, place === stop);
      markMove(card, moved ? moved.get(card.hit.id) : undefined);
    });
  }

  focus(place = 0) {
    this.cards[place]?.opener.focus();
  }

  placeOf(target) {
    return this.cards.findIndex((card) => card.element.contains(target));
  }

  keepStop(target) {
    const current = this.placeOf(target);
    if (current >= 0) this.cards.forEach((card, place) => setStop(card, place === current));
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
    const near = others.filter(({ box }) => Math.abs(box.top - row) <= 4).sort((one, other) => off(one) - off(other));
    return near[0]?.at ?? place;
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
  const refine = hit.image && el("button", { type: "button", class: "refine", tabindex: -1, "aria-label": `Now make it … with hit ${hit.rank}`,
    on: { click: () => actions.refine(hit) } }, "now make it …");
  const element = el("li", { class: `card ${hit.image ? (hit.text ? "pair" : "image") : "text"}`, data: { id: hit.id },
    draggable: hit.image ? "true" : null, on: { dragstart: (event) => event.dataTransfer?.setData(DRAGGED, hit.id) } }, opener, bar, refine);
  return { element, opener, refine, move, hit };
}

// Whether Tab stops at this card and its button; the arrows go on from there.
function setStop(card, here) {
  card.opener.tabIndex = here ? 0 : -1;
  if (card.refine) card.refine.tabIndex = here ? 0 : -1;
}

function faceOf(hit) {
  const text = hit.text?.slice(0, 600);
  return [hit.image && framed("span", hit, 512), text && el("span", { class: "caption", dir: "auto", text }),
    !hit.image && !text && el("span", { class: "caption quiet", text: hit.id })];
}

// A hit's picture in a frame, or what stands there where it is lost.
export function framed(tag, hit, side = null) {
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
