// One search as it goes on: what is known of it so far, changed in place as events come; and how the model took it, drawn from that.

import { askJson, isAbort, streamSearch, thumb } from "./api.js";
import { announce, el, find, fixed, plural, say, seconds } from "./dom.js";
import { NOUNS, browses, toPath, toRequest } from "./query.js";

export const PAGE = 24;

const fresh = () => ({ route: null, probability: null, reasoning: "", trace: null, hits: [], next: null, cut: null, note: null, error: null });

// status: "idle", "running", "done", "failed" or "stopped". cutoff and fold: what is asked for; cut: what the answer says of the cut-off.
export const newRun = (query, { cutoff, fold }, route = query.route) =>
  ({ query, asked: route, cutoff, fold, browses: browses(query), status: "idle", paging: false, ...fresh() });

const requestOf = (run, more = {}) => toRequest(run.query, { k: PAGE, route: run.asked, cutoff: run.cutoff, fold: run.fold, ...more });

// A page of what only looks through the collection, as the answer of a search.
async function browse(run, after) {
  const { items, next } = await askJson(toPath(run.query, { limit: PAGE, after }));
  return { hits: items.map((item, place) => ({ ...item, rank: run.hits.length + place + 1 })), next };
}

// Runs it to its end and never throws. `changed(what)` comes after every event.
export async function follow(run, signal, changed) {
  Object.assign(run, { status: "running", ...fresh() });
  changed("start");
  try {
    const events = run.browses ? [{ event: "hits", data: await browse(run) }] : streamSearch(requestOf(run), signal);
    for await (const { event, data } of events) {
      signal.throwIfAborted();
      take(run, event, data);
      changed(event);
    }
  } catch (error) {
    run.status = isAbort(error) ? "stopped" : "failed";
    run.error = isAbort(error) ? null : error;
    changed("end");
  }
}

function take(run, event, data) {
  const { hits, trace = {}, next = null, note = null, cutoff: cut = null } = data;
  if (event === "hits") Object.assign(run, { trace, hits: Array.isArray(hits) ? hits : [], next, note, cut, status: "done" });
  const { route, emb_probability: probability, reasoning } = { ...data, reasoning: data.text, ...trace };
  for (const [name, value] of Object.entries({ route, probability, reasoning })) run[name] = value ?? run[name];
}

// The next page, behind what is there; returns how many hits came. Throws what the server says.
export async function nextPage(run) {
  const answer = run.browses ? await browse(run, run.next) : await askJson("/search", requestOf(run, { after: run.next }));
  const known = new Set(run.hits.map((hit) => hit.id));
  const more = answer.hits.filter((hit) => !known.has(hit.id)).map((hit, place) => ({ ...hit, rank: run.hits.length + place + 1 }));
  run.hits = [...run.hits, ...more];
  run.next = more.length ? answer.next : null;
  return more.length;
}

// The steps of a reasoning: split at each "; " and new line, without the blanks that a tokenizer leaves before punctuation.
export function stepsOf(reasoning) {
  return reasoning.trim().replace(/[^\S\n]+([,.;:?!])/g, "$1").split(/;(?:\s+|$)|\n+/).map((step) => step.trim()).filter(Boolean);
}

// Where hits moved: for each id of `mine`, its rank among `theirs` less its own rank here; null where it is not among them.
export function moves(mine, theirs) {
  const places = new Map(theirs.map((hit, place) => [hit.id, place]));
  return new Map(mine.map((hit, place) => [hit.id, places.has(hit.id) ? places.get(hit.id) - place : null]));
}

const EMB = "<|emb|>";
const STATIONS = ["read", "decide", "reason", "embed", "find"];
// What each route is called while it is taken and afterwards, what screen readers hear of it, and why it was taken: by the model's own
// choice, or because it was asked for. The text of a reason goes around `<|emb|>`.
const ROUTES = {
  reason: {
    now: "reasoning …", past: "reasoned", spoken: "Not simple: the model reasons first.",
    chosen: ["Its first token is not ", ", “ready to embed”. So the query is not simple, and it first writes down what is sought."],
    asked: ["Told to reason first, whatever the chance of ", "."],
  },
  direct: {
    now: "skips reasoning", past: "skipped reasoning", spoken: "Simple: the model skips reasoning.",
    chosen: ["Its first token is ", ", “ready to embed”. So the query is simple, and there is nothing to write down."],
    asked: ["Told to embed at once, whatever the chance of ", "."],
  },
};

export class TracePanel {
  heard = 0; // steps that screen readers have heard
  saidRoute = false;
  part = (name, selector) => this.stations[name].querySelector(selector);

  // `count`: items by modality; `width`: numbers of a vector.
  constructor({ picture, text, instruction }, { width, count = {} }) {
    this.count = count;
    this.element = find("trace").content.firstElementChild.cloneNode(true);
    this.stations = Object.fromEntries([...this.element.querySelectorAll(".station")].map((station) => [station.dataset.node, station]));
    for (const name of ["badge", "total", "gauge", "chance", "why", "steps", "note"]) this[name] = this.element.querySelector(`.${name}`);
    const words = [text && el("p", { class: "asked", dir: "auto", text }), instruction && el("p", { class: "quiet", dir: "auto", text: instruction })];
    this.part("read", ".body").append(el("div", { class: "shown-query" }, thumb(picture, "the query's picture"), el("div", {}, ...words)));
    if (width) this.part("embed", "p").append(` of ${width} numbers`);
  }

  update(run) {
    const over = run.status === "done";
    const halted = run.status === "failed" || run.status === "stopped";
    Object.assign(this.element.dataset, { route: run.route ?? "", status: run.status });
    say(this.badge, ROUTES[run.route]?.[over ? "past" : "now"] ?? (halted ? "halted" : "reading …"));
    this.badge.title = run.route ? `route: ${run.route}` : "";
    this.updateDecision(run, over);
    this.updateReasoning(run, over);
    this.updateTimes(run, over);
    const at = over ? STATIONS.length : run.reasoning || run.route === "reason" ? 2 : run.route === "direct" ? 3 : 1;
    STATIONS.forEach((name, place) => {
      const state = place < at ? "done" : place === at && !halted ? "now" : "ahead";
      this.stations[name].dataset.state = name === "reason" && run.route === "direct" ? "skipped" : state;
    });
  }

  updateTimes({ route, trace, query }, over) {
    const times = trace?.seconds ?? {};
    say(this.part("read", ".time"), times.queue >= 0.0005 ? `waited ${seconds(times.queue)}` : "");
    say(this.part("embed", ".time"), trace?.cached ? "from the cache" : seconds(times.encode));
    say(this.part("find", ".time"), seconds(times.search));
    const spent = Object.values(times).filter(Number.isFinite).reduce((sum, time) => sum + time, 0);
    const cost = [route === "reason" && trace?.tokens > 0 ? plural(trace.tokens, "token") : "", seconds(spent)];
    say(this.total, over ? cost.filter(Boolean).join(" · ") : "");
    this.total.title = Object.entries(times).map(([name, value]) => `${name} ${seconds(value)}`).join(" · ");
    const counted = Object.entries(this.count).filter(([name]) => !query.modality || name === query.modality);
    const total = counted.reduce((sum, [, count]) => sum + count, 0);
    say(this.part("find", ".body"), over && total ? `among ${plural(total, NOUNS[query.modality] ?? "item")}` : "");
  }

  updateDecision(run, over) {
    const known = Number.isFinite(run.probability);
    this.gauge.style.setProperty("--part", known ? String(Math.min(1, Math.max(0.012, run.probability))) : "0");
    if (known) this.gauge.setAttribute("aria-valuenow", fixed(run.probability));
    say(this.chance, known ? chance(run.probability) : "");
    const why = ROUTES[run.route]?.[run.asked === run.route ? "asked" : "chosen"];
    if (this.why.textContent !== (why?.join(EMB) ?? "")) this.why.replaceChildren(...(why ? [why[0], el("code", { text: EMB }), why[1]] : []));
    if (run.route && !over && !this.saidRoute && !this.silent) announce(ROUTES[run.route]?.spoken);
    this.saidRoute = Boolean(run.route);
  }

  updateReasoning(run, over) {
    const steps = stepsOf(run.reasoning);
    while (this.steps.children.length > steps.length) this.steps.lastChild.remove();
    steps.forEach((step, place) => {
      const line = this.steps.children[place] ?? this.steps.appendChild(el("li", { dir: "auto" }));
      say(line, step);
      line.classList.toggle("writing", run.status === "running" && place === steps.length - 1);
    });
    // Screen readers hear each step once, when it is complete.
    const complete = over ? steps.length : Math.max(0, steps.length - 1);
    if (complete > this.heard && !this.silent) announce(`${steps.slice(this.heard, complete).join("; ")}.`);
    this.heard = run.status === "running" && !steps.length ? 0 : Math.max(this.heard, complete);
    let note = "";
    if (run.route === "direct") note = "skipped";
    else if (run.trace?.truncated) note = `It ended before ${EMB} came, so its last state was read.`;
    else if (over && run.route === "reason" && !steps.length) note = "nothing written";
    say(this.note, note);
  }
}

// A probability that is not quite 0 or 1 is not told as such.
function chance(value) {
  if (value > 0 && value < 0.0005) return "< 0.001";
  return value < 1 && value >= 0.9995 ? "> 0.999" : fixed(value);
}
