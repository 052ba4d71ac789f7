// The cut-off: how often a query whose answer is not here may be shown hits all the same. A setting of the page, not of a query.

import { find, say } from "./dom.js";
import { kindOf } from "./query.js";

let calibrated = {};
const field = () => find("cutoff");

// What to ask for: a rate, 0 for none, null where the server decides because it cannot tell for this kind of query.
export function cutoffFor(query) {
  if (!(kindOf(query) in calibrated)) return null;
  return Number(field().querySelector("input:checked")?.value ?? 0);
}

// `config`: {default, background}. Rates that the background cannot tell are not offered; without a background nothing is.
export function setCutoff(config) {
  calibrated = config?.background ?? {};
  const most = Math.max(0, ...Object.values(calibrated));
  field().hidden = most === 0;
  const own = config?.default ?? 0;
  const choices = [...field().querySelectorAll("input")];
  for (const one of choices) {
    const rate = Number(one.value);
    one.disabled = rate > 0 && rate * (most + 1) < 1;
    one.checked = rate === own;
  }
  if (!choices.some((one) => one.checked)) addChoice(own);
}

// The server's own rate, where it is none of ours.
function addChoice(rate) {
  const label = field().querySelector("label:last-of-type").cloneNode(true);
  const input = label.querySelector("input");
  Object.assign(input, { value: String(rate), checked: true, disabled: false });
  say(label.querySelector("span"), sayRate(rate));
  field().querySelector("div").append(label);
}

export const sayRate = (rate) => `1 in ${Math.round(1 / rate)}`;

// Why nothing is shown, for the `cutoff` of an answer.
export const sayCut = (cut) =>
  `Nothing here scores better than what ${sayRate(cut.rate)} queries find whose answer is not in the collection. The nearest scores ${cut.best.toFixed(2)}.`;
