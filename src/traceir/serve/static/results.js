// One search on the page: how it was taken and its hits, or the state that stands in their place; two routes of one query side by side;
// and all that is known of one hit, in a dialog. Arrows move among the cards of hits, Enter opens one, R takes it further.

import { askJson, showPicture } from "./api.js";
import { announce, button, el, find, fixed, icon, openDialog, plural, say, sayRate, toast } from "./dom.js";
import { NOUNS } from "./query.js";
import { PAGE, TracePanel, moves } from "./run.js";

const LONGEST = 20000; // characters of a text in the dialog
const TITLES = { 0: "No connection", 401: "A key is needed", 403: "This key may not search", 429: "The server is busy", 503: "The server is not ready" };

// The last part of an id, which is a file's name; pages and moments of a file keep their "#...".
export const nameOf = ({ id, fields }) => (typeof fields?.name === "string" && fields.name) || id.replace(/^.*\/(?=[^/])/s, "");

// Date and camera in a few words.
function aboutOf({ fields = {} }) {
  const [, day, time] = /^(\d{4}-\d\d-\d\d)(T\d\d:\d\d)?/.exec(fields.date) ?? [];
  const date = day ? new Date(`${day}${time ?? "T12:00"}`).toLocaleDateString([], { dateStyle: "medium" }) : String(fields.date ?? "");
  return [date, fields.camera ?? ""].filter(Boolean).join(" · ");
}

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
    this.more.hidden = !run.next || run.status !== "done";
    this.more.disabled = run.paging;
    say(this.more, run.paging ? "Loading …" : "Show more");
    this.compare.hidden = other !== null || run.status !== "done" || !run.route;
    this.element.classList.toggle("bare", run.browses || run.query.mode === "keyword");
    say(this.compare, `Compare ${run.route === "reason" ? "without" : "with"} reasoning`);
  }

  counted() {
    const { run } = this;
    if (run.status !== "done" || !run.hits.length) return "";
    const count = plural(run.hits.length, NOUNS[run.query.modality] ?? "item");
    const sort = find("sort").selectedOptions[0]?.text.toLowerCase();
    const order = run.query.sort ? sort : run.browses ? "by name" : "best first";
    const which = run.next ? `the first ${count}` : `all ${count}${run.cut ? " above the cut-off" : ""}`;
    return `${which}, ${order}`;
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
    if (run.query.where) return says("No hits", "Nothing in this collection passes the filter and fits.", button("Search without the filter", actions.unfiltered, { class: "strong" }));
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
    verdict.replaceChildren(el("p", { role: "status" }), button("End the comparison", leave, { "aria-keyshortcuts": "Escape" }));
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
    ` They share ${shared.length} of ${Math.max(first.length, second.length)}: ${kept} in the same place, ${shared.length - kept} moved.`];
}

class Grid {
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

  placeOf(target) {
    return this.cards.findIndex((card) => card.element.contains(target));
  }

  // Tab stops at this card and its button alone; the arrows go on from there.
  setStop(stop) {
    this.cards.forEach(({ opener, folded, refine }, place) => {
      for (const control of [opener, folded, refine]) if (control) control.tabIndex = place === stop ? 0 : -1;
    });
  }

  onKey(event) {
    const place = this.placeOf(event.target);
    if (event.ctrlKey || event.metaKey || event.altKey || place < 0) return;
    const { hit } = this.cards[place];
    const next = this.neighbour(place, event.key);
    if (next === null && event.key.toLowerCase() !== "r") return;
    event.preventDefault();
    this.cards[next]?.element.scrollIntoView({ block: "nearest" });
    if (next !== null) this.cards[next].opener.focus();
    else if (hit.image) this.actions.refine(hit);
  }

  neighbour(place, key) {
    const last = this.cards.length - 1;
    const ways = { ArrowRight: Math.min(place + 1, last), ArrowLeft: Math.max(place - 1, 0), Home: 0, End: last };
    if (key === "ArrowDown" || key === "ArrowUp") return this.above(place, key === "ArrowDown" ? 1 : -1);
    return ways[key] ?? null;
  }

  // The nearest card of the next row, by what is seen.
  above(place, way) {
    const here = this.cards[place].element;
    const rows = ({ element }) => (element.offsetTop - here.offsetTop) * way;
    const off = ({ element }) => Math.abs(element.offsetLeft + element.offsetWidth / 2 - here.offsetLeft - here.offsetWidth / 2);
    const others = this.cards.filter((card) => rows(card) > 0).sort((first, second) => rows(first) - rows(second) || off(first) - off(second));
    return others.length ? this.cards.indexOf(others[0]) : place;
  }
}

function makeCard(hit, place, actions) {
  const text = hit.text?.slice(0, 600);
  const face = [hit.image && framed("span", hit, 512), text && el("span", { class: "caption", dir: "auto", text })];
  const move = el("span", { class: "move", hidden: true });
  const scored = Number.isFinite(hit.score);
  const score = scored && el("span", { class: "score number", text: fixed(hit.score), title: Object.entries(hit.scores ?? {}).map(([name, value]) => `${name} ${fixed(value)}`).join(" · ") || null });
  const about = aboutOf(hit);
  const foot = el("span", { class: "foot" }, el("span", { class: "rank number", text: hit.rank }), el("span", { class: "name", dir: "auto", title: hit.id, text: nameOf(hit) }),
    move, score, about && el("span", { class: "about-hit", text: about }));
  const opener = button([...face, foot], () => actions.open(place), { class: "opener", tabindex: -1 });
  const bar = el("span", { class: "bar", "aria-hidden": "true" });
  bar.style.setProperty("--part", String(scored ? Math.min(1, Math.max(0, hit.scores?.vector ?? hit.score)) : 0));
  const folded = hit.similar?.length > 0 && button(`+${hit.similar.length} similar`, () => actions.open(place), { class: "folded", tabindex: -1,
    "aria-label": `${plural(hit.similar.length, "near-duplicate")} of hit ${hit.rank}` });
  const refine = hit.image && button("now make it …", () => actions.refine(hit),
    { class: "refine", tabindex: -1, "aria-label": `Now make it … with hit ${hit.rank}` });
  const element = el("li", { class: `card ${hit.image ? (hit.text ? "pair" : "image") : "text"}`, "data-id": hit.id }, opener, bar, folded, refine);
  return { element, opener, refine, folded, move, hit };
}

// A hit's picture in a frame, or what stands there where it is lost.
function framed(tag, hit, side = null) {
  const img = el("img", { alt: hit.text ? "" : `picture ${nameOf(hit)}`, decoding: "async", loading: "lazy", draggable: "false" });
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
  const name = [`Hit ${hit.rank}`, Number.isFinite(hit.score) && `score ${fixed(hit.score)}`, by === undefined ? "" : words,
    `${NOUNS[hit.modality] ?? "item"}: ${hit.text ? hit.text.slice(0, 200) : nameOf(hit)}`, aboutOf(hit)];
  opener.setAttribute("aria-label", name.filter(Boolean).join(", "));
}

// The dialog of a hit.
export class Details {
  dialog = find("details");

  // actions: {refine(hit), use(hit), weigh(hit, sign), similar(hit): the hits near it}
  constructor(actions) {
    this.actions = actions;
    this.dialog.addEventListener("keydown", ({ key }) => {
      if (key === "ArrowRight" || key === "ArrowLeft") this.show(this.place + (key === "ArrowRight" ? 1 : -1));
    });
  }

  // `weighs`: whether there is a query that a hit could be a term of. `closed(place)`: called with the place of the hit shown last.
  open(hits, place, { weighs, closed }) {
    Object.assign(this, { hits, weighs });
    this.dialog.addEventListener("close", () => closed(this.place), { once: true });
    this.show(place);
  }

  // The hit at a place, or an item that lies near it.
  show(place, hit = this.hits[place]) {
    if (!hit) return;
    this.place = place;
    const copy = () => navigator.clipboard.writeText(hit.id).then(() => toast("Copied."), () => toast("The browser does not let this page copy."));
    const act = (what, ...how) => () => { this.dialog.close(); what(hit, ...how); };
    const round = (name, label, attributes, onclick) => button(icon(name), onclick, { class: "round", "aria-label": label, ...attributes });
    const turner = (way, name, label) => round(name, label, { disabled: !this.hits[place + way] }, () => this.show(place + way));
    const near = el("div", { class: "near" });
    this.dialog.replaceChildren(
      el("header", {}, el("h2", { id: "details-title", tabindex: -1, dir: "auto", title: hit.id, text: `${hit.rank ? `Hit ${hit.rank}: ` : ""}${nameOf(hit)}` }),
        el("span", { class: "quiet", text: NOUNS[hit.modality] ?? hit.modality }),
        turner(-1, "back", "Previous hit"), turner(1, "forth", "Next hit"), round("cross", "Close", { "data-close": true })),
      el("div", { class: "leaf" }, hit.image && framed("div", hit),
        el("div", { class: "about" }, hit.text && el("p", { class: "whole-text", dir: "auto", text: hit.text.slice(0, LONGEST) }),
          el("dl", { class: "facts" }, ...factsOf(hit)))),
      near,
      el("footer", {}, button("Copy id", copy, { class: "plain" }),
        this.weighs && button("Less like this", act(this.actions.weigh, -1)), this.weighs && button("More like this", act(this.actions.weigh, 1)),
        button("Search with this", act(this.actions.use)), hit.image && button("Now make it …", act(this.actions.refine), { class: "strong" })));
    openDialog(this.dialog);
    this.dialog.querySelector("h2").focus();
    this.showNear(near, hit);
  }

  // What was folded under a hit, and what else lies near it; nothing where that cannot be had.
  async showNear(near, hit) {
    const row = (title, items) => items.length > 0 && el("section", { "aria-label": title }, el("h3", { text: title }), el("ul", { class: "shelf", role: "list" },
      ...items.map((item) => el("li", {}, button(item.image ? framed("span", item, 256) : el("span", { class: "caption", text: item.text ?? item.id }),
        () => this.show(this.place, item), { title: item.id, "aria-label": nameOf(item) })))));
    const folded = await Promise.all((hit.similar ?? []).slice(0, 24).map((id) => askJson(`/items/${encodeURIComponent(id)}`).catch(() => null)));
    const known = new Set([hit.id, ...(hit.similar ?? [])]);
    const others = await this.actions.similar(hit).catch(() => []);
    const rows = [row("Folded under it", folded.filter(Boolean)), row("Similar", others.filter(({ id }) => !known.has(id)).slice(0, 8))];
    near.replaceChildren(...rows.filter(Boolean));
  }
}

function factsOf({ id, score, rank, modality, fields, scores }) {
  const others = Object.entries(scores ?? {}).filter(([, value]) => value !== score);
  const facts = Object.entries({ id, score, ...Object.fromEntries(others), rank, modality, ...fields }).filter(([, value]) => value !== undefined);
  const shown = (value) => (typeof value === "string" ? value : Number.isFinite(value) ? String(+value.toFixed(4)) : JSON.stringify(value)).slice(0, LONGEST);
  return facts.map(([name, value]) => el("div", {}, el("dt", { dir: "auto", text: name }), el("dd", { dir: "auto", text: shown(value) })));
}
