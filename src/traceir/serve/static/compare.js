// Two routes of one query side by side: what they agree on, what moved, and what reasoning cost.

import { button, el, plural, seconds } from "./dom.js";
import { moves } from "./run.js";

const LEGEND = [["▲", "up", "higher here than on the other route"], ["▼", "down", "lower here"], ["=", "", "the same place"],
  ["only here", "new", "not among the other's hits"]];

// The line above both columns. `one` and `other` are runs; `leave` ends the comparison.
export function drawVerdict(place, one, other, leave) {
  if (place.hidden || !place.firstChild) {
    place.replaceChildren(el("p", { role: "status" }), button("End the comparison", leave, { "aria-keyshortcuts": "Escape" }),
      el("p", { class: "legend quiet" }, ...LEGEND.map(([sign, kind, words]) => el("span", {}, el("span", { class: `move ${kind}`, text: sign }), ` ${words}`))));
  }
  place.hidden = false;
  const told = el("p", {}, ...(one.status === "done" && other.status === "done" ? judged(one, other) : ["Comparing the two routes …"]));
  if (place.firstChild.textContent !== told.textContent) place.firstChild.replaceChildren(...told.childNodes);
}

function judged(one, other) {
  const [first, second] = [one.hits, other.hits];
  const shared = [...moves(first, second).values()].filter((move) => move !== null);
  const kept = shared.filter((move) => move === 0).length;
  const same = first.length > 0 && first[0].id === second[0]?.id;
  return [el("b", { text: same ? "Both routes find the same first hit." : "The routes disagree on the first hit." }),
    ` They share ${shared.length} of ${Math.max(first.length, second.length)}: ${kept} in the same place, ${shared.length - kept} moved.`,
    costOf(...(one.route === "reason" ? [one, other] : [other, one]))];
}

function costOf(reasoned, direct) {
  if (reasoned.route === direct.route) return ` Both took the ${direct.route} route.`;
  const more = (reasoned.trace.seconds?.encode ?? NaN) - (direct.trace.seconds?.encode ?? NaN);
  const fresh = !reasoned.trace.cached && !direct.trace.cached && more > 0;
  return ` Reasoning cost ${plural(reasoned.trace.tokens ?? 0, "token")}${fresh ? ` and ${seconds(more)}` : ""}.`;
}

// While a hit is pointed at or has the focus, the same hit in the other column is marked.
export function linkTwins(columns) {
  const mark = (event) => {
    const card = event.type === "focusout" ? null : event.target.closest(".card[data-id]");
    for (const one of columns.querySelectorAll(".card")) one.classList.toggle("twin", Boolean(card) && one !== card && one.dataset.id === card.dataset.id);
  };
  for (const kind of ["pointerover", "pointerleave", "focusin", "focusout"]) columns.addEventListener(kind, mark);
}
