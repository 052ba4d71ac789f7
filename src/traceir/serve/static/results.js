// One search on the page: how it was taken and its hits, or the state that stands in their place; two routes of one query side by side;
// and all that is known of one hit, in a dialog. Arrows move among the cards of hits, Enter opens one, R takes it further.

import { askJson, showPicture } from "./api.js";
import { announce, button, el, find, fixed, icon, openDialog, plural, say, sayRate, tell, toast } from "./dom.js";
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
  cards = []; // of its hits
  placeOf = (target) => this.cards.findIndex((card) => card.element.contains(target));

  // actions: {open(run, place), refine(hit), retry(run), more(column), anything(query), compare()}
  constructor(run, { config, name, actions }) {
    this.run = run;
    this.actions = actions;
    this.trace = new TracePanel(run.query, { width: config.model?.width, count: config.count });
    this.grid = el("ol", { class: "grid", role: "list", "aria-label": "Hits, best first", on: {
      keydown: (event) => this.onKey(event), focusin: (event) => this.setStop(this.placeOf(event.target)) } });
    this.count = el("p", { class: "count quiet" });
    this.compare = button("", actions.compare, { class: "compare", "aria-keyshortcuts": "c", hidden: true });
    this.state = el("div", { class: "state", hidden: true });
    this.note = el("p", { class: "note", dir: "auto" });
    this.more = button("More", () => actions.more(this), { class: "more", hidden: true });
    this.element = el("section", { class: "column", "aria-label": name },
      this.trace.element,
      el("section", { class: "found", "aria-label": "Hits" },
        el("header", {}, el("h2", { text: "Hits" }), this.count, this.compare), this.state, this.note, this.grid, this.more));
  }

  // Brings everything up to the run. `other` is the run beside it, `tells` whether screen readers hear of it.
  update({ other = null, tells = true } = {}) {
    const { run } = this;
    this.trace.silent = !tells;
    this.trace.update(run);
    this.showState();
    if (run.hits.length) this.showHits(other?.status === "done" ? moves(run.hits, other.hits) : null);
    else this.clear(run.status === "running" || run.status === "idle" ? PAGE : 0);
    say(this.count, this.counted());
    tell(this.note, run.note);
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
    const order = run.query.sort ? find("sort").selectedOptions[0]?.text.toLowerCase() : run.browses ? "by name" : "best first";
    return `${run.next ? `the first ${count}` : `all ${count}${run.cut ? " above the cut-off" : ""}`}, ${order}`;
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
    const strong = (text, act) => button(text, act, { class: "strong" });
    const retry = () => actions.retry(run);
    if (run.status === "failed") {
      const { status, message, retryAfter } = run.error;
      return says(TITLES[status] ?? (status >= 500 ? "The search failed" : "The server refused this search"), "", el("p", { dir: "auto", text: message }),
        retryAfter && el("p", { class: "quiet", text: `Try again in ${Math.ceil(retryAfter)} s.` }), strong("Try again", retry));
    }
    if (run.status === "stopped") return says("Stopped", "This search was stopped before the hits came.", strong("Search again", retry));
    if (run.status !== "done" || run.hits.length) return [];
    if (typeof run.cut?.best === "number") {
      const why = `Nothing here scores better than what ${sayRate(run.cut.rate)} queries find whose answer is not in the collection.`;
      return says("Nothing found", `${why} The nearest scores ${run.cut.best.toFixed(2)}.`,
        button("Show the nearest all the same", () => actions.retry(Object.assign(run, { cutoff: 0 }))));
    }
    const { where, modality } = run.query;
    if (where) return says("No hits", "Nothing in this collection passes the filter and fits.", strong("Search without the filter", actions.unfiltered));
    if (!modality) return says("No hits", "The collection is empty.");
    return says("No hits", `There is no ${NOUNS[modality]} in this collection that fits.`, strong("Look for anything", () => actions.anything(run.query)));
  }

  // Empties the grid, but for ghosts of so many hits that are waited for.
  clear(waited = 0) {
    if (waited && this.grid.ariaBusy) return;
    this.cards = [];
    this.grid.ariaBusy = waited ? "true" : null;
    this.grid.replaceChildren(...Array.from({ length: waited }, () => el("li", { class: "card ghost", "aria-hidden": "true" })));
  }

  // Shows hits; those that are there already stay as they are. `moved`: as `moves` of run.js says, or null.
  showHits(moved) {
    if (!this.cards.length) this.clear();
    for (const hit of this.run.hits.slice(this.cards.length)) {
      this.cards.push(makeCard(hit, this.cards.length, this));
      this.grid.append(this.cards.at(-1).element);
    }
    this.setStop(Math.max(0, this.cards.findIndex((card) => card.opener.tabIndex === 0)));
    for (const card of this.cards) markMove(card, moved ? moved.get(card.hit.id) : undefined);
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
    const card = this.cards[place];
    const ways = {
      ArrowRight: () => this.cards[place + 1], ArrowLeft: () => this.cards[place - 1], Home: () => this.cards[0], End: () => this.cards.at(-1),
      ArrowDown: () => this.beside(card, 1), ArrowUp: () => this.beside(card, -1), r: () => null, R: () => null,
    };
    if (!Object.hasOwn(ways, event.key)) return;
    event.preventDefault();
    const next = ways[event.key]();
    next?.element.scrollIntoView({ block: "nearest" });
    if (next !== null) (next ?? card).opener.focus();
    else if (card.hit.image) this.actions.refine(card.hit);
  }

  // The nearest card of the next row (1) or the one before (-1), by what is seen.
  beside({ element: here }, way) {
    const rows = ({ element }) => (element.offsetTop - here.offsetTop) * way;
    const off = ({ element }) => Math.abs(element.offsetLeft + element.offsetWidth / 2 - here.offsetLeft - here.offsetWidth / 2);
    const others = this.cards.filter((card) => rows(card) > 0).sort((first, second) => rows(first) - rows(second) || off(first) - off(second));
    return others[0];
  }
}

// The line above two columns: what the routes agree on, and what moved.
export function drawVerdict(mine, other) {
  const verdict = find("verdict-says");
  const text = el("p", {}, ...(mine.status === "done" && other.status === "done" ? compared(mine.hits, other.hits) : ["Comparing the two routes …"]));
  if (verdict.textContent !== text.textContent) verdict.replaceChildren(...text.childNodes);
}

function compared(first, second) {
  const shared = [...moves(first, second).values()].filter((move) => move !== null);
  const kept = shared.filter((move) => move === 0).length;
  const same = first.length > 0 && first[0].id === second[0]?.id;
  return [el("b", { text: same ? "Both routes find the same first hit." : "The routes disagree on the first hit." }),
    ` They share ${shared.length} of ${Math.max(first.length, second.length)}: ${kept} in the same place, ${shared.length - kept} moved.`];
}

function makeCard(hit, place, { run, actions }) {
  const open = () => actions.open(run, place);
  const text = hit.text?.slice(0, 600);
  const face = [hit.image && framed("span", hit, 512), text && el("span", { class: "caption", dir: "auto", text })];
  const move = el("span", { class: "move", hidden: true });
  const scored = Number.isFinite(hit.score);
  const score = scored && el("span", { class: "score number", text: fixed(hit.score), title: Object.entries(hit.scores ?? {}).map(([name, value]) => `${name} ${fixed(value)}`).join(" · ") || null });
  const about = aboutOf(hit);
  const foot = el("span", { class: "foot" }, el("span", { class: "rank number", text: hit.rank }), el("span", { class: "name", dir: "auto", title: hit.id, text: nameOf(hit) }),
    move, score, about && el("span", { class: "about-hit", text: about }));
  const opener = button([...face, foot], open, { class: "opener", tabindex: -1 });
  const bar = el("span", { class: "bar", "aria-hidden": "true" });
  bar.style.setProperty("--part", String(scored ? Math.min(1, Math.max(0, hit.scores?.vector ?? hit.score)) : 0));
  const folded = hit.similar?.length > 0 && button(`+${hit.similar.length} similar`, open, { class: "folded", tabindex: -1,
    "aria-label": `${plural(hit.similar.length, "near-duplicate")} of hit ${hit.rank}` });
  const refine = hit.image && button("now make it …", () => actions.refine(hit), { class: "refine", tabindex: -1, "aria-label": `Now make it … with hit ${hit.rank}` });
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
  let [kind, sign, words] = ["", "", ""];
  if (by === null) [kind, sign, words] = ["new", "only here", "not among the hits of the other route"];
  else if (by === 0) [kind, sign, words] = ["same", "=", "same place on the other route"];
  else if (by > 0) [kind, sign, words] = ["up", `▲ ${by}`, `${plural(by, "place")} higher than on the other route`];
  else if (by < 0) [kind, sign, words] = ["down", `▼ ${-by}`, `${plural(-by, "place")} lower than on the other route`];
  element.dataset.move = kind;
  Object.assign(move, { hidden: !kind, className: `move ${kind}`, textContent: sign, title: words });
  const name = [`Hit ${hit.rank}`, Number.isFinite(hit.score) && `score ${fixed(hit.score)}`, words,
    `${NOUNS[hit.modality] ?? "item"}: ${hit.text ? hit.text.slice(0, 200) : nameOf(hit)}`, aboutOf(hit)];
  opener.setAttribute("aria-label", name.filter(Boolean).join(", "));
}

// The dialog of a hit.
export class Details {
  dialog = find("details");

  // actions: {refine(hit), use(hit), weigh(hit, sign)}
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
    const { weighs, actions } = this;
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
        weighs && button("Less like this", act(actions.weigh, -1)), weighs && button("More like this", act(actions.weigh, 1)),
        button("Search with this", act(actions.use)), hit.image && button("Now make it …", act(actions.refine), { class: "strong" })));
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
    const asked = { ...(hit.image ? { image: { item: hit.id } } : { text: hit.text }), route: "direct", k: 9, cutoff: 0 };
    const { hits } = await askJson("/search", asked).catch(() => ({ hits: [] }));
    const rows = [row("Folded under it", folded.filter(Boolean)), row("Similar", hits.filter(({ id }) => !known.has(id)).slice(0, 8))];
    near.replaceChildren(...rows.filter(Boolean));
  }
}

function factsOf({ id, score, rank, modality, fields, scores }) {
  const others = Object.entries(scores ?? {}).filter(([, value]) => value !== score);
  const facts = Object.entries({ id, score, ...Object.fromEntries(others), rank, modality, ...fields }).filter(([, value]) => value !== undefined);
  const shown = (value) => (typeof value === "string" ? value : Number.isFinite(value) ? String(+value.toFixed(4)) : JSON.stringify(value)).slice(0, LONGEST);
  return facts.map(([name, value]) => el("div", {}, el("dt", { dir: "auto", text: name }), el("dd", { dir: "auto", text: shown(value) })));
}
