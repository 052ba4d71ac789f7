// The road of one query, drawn as it is taken: read, decide, reason, embed, find.

import { announce, el, fixed, plural, say, seconds } from "./dom.js";
import { pathOfItem, showPicture } from "./api.js";
import { NOUNS } from "./query.js";
import { stepsOf } from "./run.js";

const WORDS = {
  reason: "Not simple: it writes down what is sought, then embeds.",
  direct: "Simple: it embeds at once.",
};
const FORCED = { reason: "Made to reason first.", direct: "Made to embed at once." };

export class Road {
  // `count`: items by modality; `width`: numbers of a vector.
  constructor(query, { width = null, count = {} } = {}) {
    [this.width, this.count] = [width, count];
    this.told = 0;
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
    this.gauge = el("div", { class: "gauge", role: "meter", "aria-label": "Probability of <|emb|> as the first token",
      "aria-valuemin": 0, "aria-valuemax": 1 }, el("span", { class: "fill" }));
    this.chance = el("output", { class: "number" });
    this.why = el("p", { class: "quiet" });
    decide.body.append(
      el("div", { class: "chance" }, el("span", {}, "P(", el("code", { text: "<|emb|>" }), ")"), this.gauge, this.chance), this.why);
    this.steps = el("ol", { class: "steps", "aria-label": "The model's reasoning", dir: "auto" });
    this.note = el("p", { class: "quiet" });
    reason.body.append(this.steps, this.note);
    this.readOut = el("p", { class: "quiet" }, el("code", { class: "token", text: "<|emb|>" }),
      this.width ? ` ${this.width} numbers` : " read out");
    embed.body.append(this.readOut);
  }

  update(run) {
    const { trace } = run;
    const over = run.status === "done";
    const halted = run.status === "failed" || run.status === "stopped";
    this.element.dataset.route = run.route ?? "";
    this.element.dataset.status = run.status;
    this.badge.className = `badge ${run.route ?? ""}`;
    say(this.badge, run.route ?? (halted ? "halted" : "reading"));
    this.updateDecision(run);
    this.updateReasoning(run, over);
    const times = trace?.seconds ?? {};
    say(this.nodes.read.time, times.queue >= 0.0005 ? `waited ${seconds(times.queue)}` : "");
    say(this.nodes.embed.time, seconds(times.encode));
    say(this.nodes.find.time, seconds(times.search));
    if (trace?.cached) say(this.nodes.embed.time, "from the cache");
    const spent = Object.values(times).filter(Number.isFinite).reduce((sum, one) => sum + one, 0);
    say(this.total, over ? seconds(spent) : "");
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

  updateDecision(run) {
    const known = Number.isFinite(run.probability);
    this.gauge.classList.toggle("unknown", !known);
    this.gauge.style.setProperty("--part", known ? String(Math.min(1, Math.max(0, run.probability))) : "0");
    if (known) this.gauge.setAttribute("aria-valuenow", fixed(run.probability));
    say(this.chance, known ? fixed(run.probability) : "");
    say(this.why, run.route ? (run.asked === run.route ? FORCED : WORDS)[run.route] ?? "" : "");
  }

  updateReasoning(run, over) {
    const steps = stepsOf(run.reasoning);
    while (this.steps.children.length > steps.length) this.steps.lastChild.remove();
    steps.forEach((step, place) => {
      const line = this.steps.children[place] ?? this.steps.appendChild(el("li"));
      say(line, step);
      line.classList.toggle("writing", !over && run.status === "running" && place === steps.length - 1);
    });
    this.tell(steps, over);
    const tokens = run.trace?.tokens;
    const written = Number.isFinite(tokens) && tokens > 0 ? plural(tokens, "token") : "";
    say(this.nodes.reason.time, run.route === "reason" ? written : "");
    let note = "";
    if (run.route === "direct") note = "skipped";
    else if (run.trace?.truncated) note = "It ended without <|emb|>; its last state was read.";
    else if (over && run.route === "reason" && !steps.length) note = "nothing written";
    say(this.note, note);
  }

  // Screen readers hear each step once, when it is complete.
  tell(steps, over) {
    const complete = over ? steps.length : Math.max(0, steps.length - 1);
    if (complete > this.told && !this.silent) announce(steps.slice(this.told, complete).join("; "));
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
