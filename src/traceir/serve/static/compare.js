// Two routes of one query side by side: what they agree on, and what reasoning cost.

import { button, el, seconds } from "./dom.js";

// The line above both columns. `one` and `other` are runs; `leave` ends the comparison.
export function drawVerdict(place, one, other, leave) {
  place.hidden = false;
  place.replaceChildren(
    el("p", { role: "status" }, ...(one.status === "done" && other.status === "done" ? judged(one, other) : ["Comparing the two routes …"])),
    button("End the comparison", leave, { "aria-keyshortcuts": "Escape" }));
}

function judged(one, other) {
  const [first, second] = [one.hits, other.hits];
  const depth = Math.min(first.length, second.length);
  const theirs = new Set(second.map((hit) => hit.id));
  const shared = first.filter((hit) => theirs.has(hit.id)).length;
  const same = depth > 0 && first[0].id === second[0].id;
  const words = [el("b", { text: same ? "Both routes find the same first hit." : "The routes disagree on the first hit." }),
    ` They share ${shared} of ${Math.max(first.length, second.length)}.`];
  const [reasoned, direct] = one.route === "reason" ? [one, other] : [other, one];
  const more = (reasoned.trace?.seconds?.encode ?? NaN) - (direct.trace?.seconds?.encode ?? NaN);
  const tokens = reasoned.trace?.tokens ?? 0;
  if (reasoned.route === direct.route) words.push(` Both went the ${direct.route} route.`);
  else if (Number.isFinite(more) && more > 0) words.push(` Reasoning took ${tokens} tokens and ${seconds(more)} more.`);
  return words;
}
