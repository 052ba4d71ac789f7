// The road of one query, drawn as it is taken: read, decide, reason, embed, find.

import { announce, el, fixed, plural, say, seconds } from "./dom.js";
import { pathOfItem, showPicture } from "./api.js";
import { NOUNS } from "./query.js";
import { stepsOf } from "./run.js";

// What each route is called while it is taken and afterwards, and why it was taken.
const NOW = { reason: "reasoning …", direct: "skips reasoning" };
const PAST = { reason: "reasoned", direct: "skipped reasoning" };
const CHOSEN = {
  reason: ["Its first token is not ", ", “ready to embed”. So the query is not simple, and it first writes down what is sought."],
  direct: ["Its first token is ", ", “ready to embed”. So the query is simple, and there is nothing to write down."],
};
const TOLD = {
  reason: ["Told to reason first, whatever the chance of ", "."],
  direct: ["Told to embed at once, whatever the chance of ", "."],
};
const SPOKEN = { reason: "Not simple: the model reasons first.", direct: "Simple: the model skips reasoning." };
const EMB = "<|emb|>";

export class Road {
  // `count`: items by modality; `width`: numbers of a vector.
  constructor(query, { width = null, count = {} } = {}) {
    [this.width, this.count] = [width, count];
    this.told = 0;
    this.saidRoute = false;
    this.nodes = { read: node("read", "Read"), decide: node("decide", "Decide"), reason: node("reason", "Reason"),
      embed: node("embed", "Embed"), find: node("find", "Find") };
    this.badge = el("span", { class: "badge" });
    this.total = el("span", { class: "total quiet" });
    this.element = el("section", { class: "road", "aria-label": "How the model took it" },
      el("header", {}, el("h2", { text: "Trace" }), this.badge, this.total),
      el("ol", { class: "rail", role: "list" }, ...Object.values(this.nodes).map((one) => one.element)));
    this.draw(query);
  }

  draw(query) {
    const { read, decide, reason, embed } = this.nodes;
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
    this.readOut = el("p", { class: "quiet" }, el("code", { class: "token", text: EMB }),
      this.width ? ` → a vector of ${this.width} numbers` : " → a vector");
    embed.body.append(this.readOut);
  }

  update(run) {
    const { trace } = run;
    const over = run.status === "done";
    const halted = run.status === "failed" || run.status === "stopped";
    this.element.dataset.route = run.route ?? "";
    this.element.dataset.status = run.status;
    this.badge.className = `badge ${run.route ?? ""}`;
    say(this.badge, (over ? PAST : NOW)[run.route] ?? (halted ? "halted" : "reading …"));
    this.badge.title = run.route ? `route: ${run.route}` : "";
    this.updateDecision(run, over);
    this.updateReasoning(run, over);
    const times = trace?.seconds ?? {};
    say(this.nodes.read.time, times.queue >= 0.0005 ? `waited ${seconds(times.queue)}` : "");
    say(this.nodes.embed.time, seconds(times.encode));
    say(this.nodes.find.time, seconds(times.search));
    if (trace?.cached) say(this.nodes.embed.time, "from the cache");
    const spent = Object.values(times).filter(Number.isFinite).reduce((sum, one) => sum + one, 0);
    const cost = [run.route === "reason" && trace?.tokens > 0 ? plural(trace.tokens, "token") : "", seconds(spent)];
    say(this.total, over ? cost.filter(Boolean).join(" · ") : "");
    this.total.title = Object.entries(times).map(([name, value]) => `${name} ${seconds(value)}`).join(" · ");
    say(this.nodes.find.body, over ? this.among(run.query.modality) : "");
    this.mark(run, over, halted);
  }

  // How many items were searched.
  among(modality) {
    const counted = Object.entries(this.count).filter(([name]) => !modality || name === modality);
    const total = counted.reduce((sum, [, count]) => sum + count, 0);
    return total ? `among ${plural(total, NOUNS[modality] ?? "item")}` : "";
  }

  updateDecision(run, over) {
    const known = Number.isFinite(run.probability);
    this.gauge.classList.toggle("unknown", !known);
    this.gauge.style.setProperty("--part", known ? String(Math.min(1, Math.max(0, run.probability))) : "0");
    if (known) this.gauge.setAttribute("aria-valuenow", fixed(run.probability));
    say(this.chance, known ? chance(run.probability) : "");
    const [before, after] = (run.asked === run.route ? TOLD : CHOSEN)[run.route] ?? ["", ""];
    if (this.why.textContent !== (before && before + EMB + after)) {
      this.why.replaceChildren(...(before ? [before, el("code", { text: EMB }), after] : []));
    }
    if (run.status === "running" && !run.route) this.saidRoute = false;
    if (run.route && !over && !this.saidRoute && !this.silent) announce(SPOKEN[run.route] ?? "");
    if (run.route) this.saidRoute = true;
  }

  updateReasoning(run, over) {
    const steps = stepsOf(run.reasoning);
    while (this.steps.children.length > steps.length) this.steps.lastChild.remove();
    steps.forEach((step, place) => {
      const line = this.steps.children[place] ?? this.steps.appendChild(el("li", { dir: "auto" }));
      say(line, step);
      line.classList.toggle("writing", !over && run.status === "running" && place === steps.length - 1);
    });
    this.tell(steps, over);
    if (run.status === "running" && !steps.length) this.told = 0;
    let note = "";
    if (run.route === "direct") note = "skipped";
    else if (run.trace?.truncated) note = `It ended before ${EMB} came, so its last state was read.`;
    else if (over && run.route === "reason" && !steps.length) note = "nothing written";
    say(this.note, note);
  }

  // Screen readers hear each step once, when it is complete.
  tell(steps, over) {
    const complete = over ? steps.length : Math.max(0, steps.length - 1);
    if (complete > this.told && !this.silent) announce(`${steps.slice(this.told, complete).join("; ")}.`);
    this.told = Math.max(this.told, complete);
  }

  mark(run, over, halted) {
    const order = ["read", "decide", "reason", "embed", "find"];
    const at = over ? order.length : run.reasoning || run.route === "reason" ? 2 : run.route === "direct" ? 3 : 1;
    order.forEach((name, place) => {
      let state = place < at ? "done" : place === at && !halted ? "now" : "ahead";
      if (name === "reason" && run.route === "direct") state = "skipped";
      this.nodes[name].element.dataset.state = state;
    });
  }
}

function node(name, title) {
  const body = el("div", { class: "body" });
  const time = el("span", { class: "time number" });
  const element = el("li", { class: "station", data: { node: name } }, el("h3", {}, title, time), body);
  return { element, body, time };
}

// A probability that is not quite 0 or 1 is not told as such.
function chance(value) {
  if (value > 0 && value < 0.0005) return "< 0.001";
  return value < 1 && value >= 0.9995 ? "> 0.999" : fixed(value);
}

// The picture and the words that were asked.
export function shownQuery(query) {
  const shown = el("div", { class: "shown-query" });
  if (query.picture) {
    const img = el("img", { alt: "the query's picture", class: "thumb" });
    shownPicture(img, query.picture);
    shown.append(img);
  }
  const words = el("div", {});
  if (query.text) words.append(el("p", { class: "asked", dir: "auto", text: query.text }));
  if (query.instruction) words.append(el("p", { class: "quiet", dir: "auto", text: query.instruction }));
  shown.append(words);
  return shown;
}

export function shownPicture(img, picture) {
  const lost = () => img.classList.add("lost");
  if (picture.kind === "item") {
    showPicture(img, picture.path ?? pathOfItem(picture.id), 256, lost);
  } else {
    img.addEventListener("error", lost, { once: true });
    img.src = picture.data;
  }
}
