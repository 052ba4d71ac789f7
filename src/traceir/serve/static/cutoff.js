// The cut-off: how often a query whose answer is not here may be shown hits all the same. A setting of the page, not of a query.

import { find, say } from "./dom.js";
import { kindOf } from "./query.js";

let calibrated = {};
const choices = () => [...find("cutoff").querySelectorAll("input")];

// What to ask for: a rate, 0 for none, null where the server decides because it cannot tell for this kind of query.
export function cutoffFor(query) {
  return kindOf(query) in calibrated ? Number(choices().find((one) => one.checked)?.value ?? 0) : null;
}

// `config`: {default, background}. Rates that the background cannot tell are not offered; without a background nothing is.
export function setCutoff(config) {
  calibrated = config?.background ?? {};
  const most = Math.max(0, ...Object.values(calibrated));
  const own = config?.default ?? 0;
  find("cutoff").hidden = most === 0;
  if (!choices().some((one) => Number(one.value) === own)) addChoice(own);
  for (const one of choices()) {
    const rate = Number(one.value);
    one.disabled = rate > 0 && rate !== own && rate * (most + 1) < 1;
    one.checked = rate === own;
  }
}

// The server's own rate, where it is none of ours.
function addChoice(rate) {
  const label = find("cutoff").querySelector("label:last-of-type").cloneNode(true);
  label.querySelector("input").value = String(rate);
  say(label.querySelector("span"), sayRate(rate));
  find("cutoff").querySelector("div").append(label);
}

const sayRate = (rate) => `1 in ${Math.round(1 / rate)}`;

// Why nothing is shown, for the `cutoff` of an answer.
export const sayCut = (cut) =>
  `Nothing here scores better than what ${sayRate(cut.rate)} queries find whose answer is not in the collection. The nearest scores ${cut.best.toFixed(2)}.`;
