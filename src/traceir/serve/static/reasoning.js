// How the model took one query, drawn as it happens: read, decide, reason, embed, find.

import { thumb } from "./api.js";
import { announce, el, fixed, plural, say, seconds } from "./dom.js";
import { NOUNS } from "./query.js";
import { stepsOf } from "./run.js";

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

  // `count`: items by modality; `width`: numbers of a vector.
  constructor(query, { width, count = {} }) {
    this.count = count;
    this.stations = Object.fromEntries(STATIONS.map((name) => [name, station(name)]));
    this.badge = el("span", { class: "badge" });
    this.total = el("span", { class: "total quiet" });
    this.element = el("section", { class: "trace", "aria-label": "How the model took it" },
      el("header", {}, el("h2", { text: "Trace" }), this.badge, this.total),
      el("ol", { role: "list" }, ...Object.values(this.stations).map(({ element }) => element)));
    const { read, decide, reason, embed } = this.stations;
    read.body.append(shownQuery(query));
    this.gauge = el("div", { class: "gauge", role: "meter", "aria-label": `Probability that the first token is ${EMB}`,
      "aria-valuemin": 0, "aria-valuemax": 1 }, el("span", { class: "fill" }));
    this.chance = el("output", { class: "number" });
    this.why = el("p", { class: "quiet" });
    const title = `How probable ${EMB} is as the very first token that the model writes`;
    decide.body.append(
      el("div", { class: "chance", title }, el("span", {}, "P(", el("code", { text: EMB }), " first)"), this.gauge, this.chance), this.why);
    this.steps = el("ol", { class: "steps", "aria-label": "The model's reasoning" });
    this.note = el("p", { class: "quiet" });
    reason.body.append(this.steps, this.note);
    embed.body.append(el("p", { class: "quiet" }, el("code", { class: "token", text: EMB }), ` → a vector${width ? ` of ${width} numbers` : ""}`));
  }

  update(run) {
    const over = run.status === "done";
    const halted = run.status === "failed" || run.status === "stopped";
    Object.assign(this.element.dataset, { route: run.route ?? "", status: run.status });
    this.badge.className = `badge ${run.route ?? ""}`;
    say(this.badge, ROUTES[run.route]?.[over ? "past" : "now"] ?? (halted ? "halted" : "reading …"));
    this.badge.title = run.route ? `route: ${run.route}` : "";
    this.updateDecision(run, over);
    this.updateReasoning(run, over);
    this.updateTimes(run, over);
    this.mark(run, over, halted);
  }

  updateTimes({ route, trace, query }, over) {
    const times = trace?.seconds ?? {};
    const { read, embed, find } = this.stations;
    say(read.time, times.queue >= 0.0005 ? `waited ${seconds(times.queue)}` : "");
    say(embed.time, trace?.cached ? "from the cache" : seconds(times.encode));
    say(find.time, seconds(times.search));
    const spent = Object.values(times).filter(Number.isFinite).reduce((sum, time) => sum + time, 0);
    const cost = [route === "reason" && trace?.tokens > 0 ? plural(trace.tokens, "token") : "", seconds(spent)];
    say(this.total, over ? cost.filter(Boolean).join(" · ") : "");
    this.total.title = Object.entries(times).map(([name, value]) => `${name} ${seconds(value)}`).join(" · ");
    const counted = Object.entries(this.count).filter(([name]) => !query.modality || name === query.modality);
    const total = counted.reduce((sum, [, count]) => sum + count, 0);
    say(find.body, over && total ? `among ${plural(total, NOUNS[query.modality] ?? "item")}` : "");
  }

  updateDecision(run, over) {
    const known = Number.isFinite(run.probability);
    this.gauge.classList.toggle("unknown", !known);
    this.gauge.style.setProperty("--part", known ? String(Math.min(1, Math.max(0, run.probability))) : "0");
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

  mark(run, over, halted) {
    const at = over ? STATIONS.length : run.reasoning || run.route === "reason" ? 2 : run.route === "direct" ? 3 : 1;
    STATIONS.forEach((name, place) => {
      const state = place < at ? "done" : place === at && !halted ? "now" : "ahead";
      this.stations[name].element.dataset.state = name === "reason" && run.route === "direct" ? "skipped" : state;
    });
  }
}

function station(name) {
  const body = el("div", { class: "body" });
  const time = el("span", { class: "time number" });
  const title = name[0].toUpperCase() + name.slice(1);
  return { element: el("li", { class: "station", data: { node: name } }, el("h3", {}, title, time), body), body, time };
}

// A probability that is not quite 0 or 1 is not told as such.
function chance(value) {
  if (value > 0 && value < 0.0005) return "< 0.001";
  return value < 1 && value >= 0.9995 ? "> 0.999" : fixed(value);
}

// The picture and the words that were asked.
function shownQuery({ picture, text, instruction }) {
  return el("div", { class: "shown-query" }, thumb(picture, "the query's picture"), el("div", {},
    text && el("p", { class: "asked", dir: "auto", text }), instruction && el("p", { class: "quiet", dir: "auto", text: instruction })));
}
