// Some pictures of the collection, to start from without a picture of one's own.

import { getItems } from "./api.js";
import { el, find } from "./dom.js";
import { itemPicture } from "./query.js";
import { shownPicture } from "./reasoning.js";

const MOST = 6;
const PLACES = 9;
const LOOKED_AT = 24;

// Shows pictures from all over the collection; `take(hit)` is called with the one that is pressed. Where there are none, nothing is shown.
export async function drawShelf(count, take) {
  const total = Object.values(count).reduce((sum, one) => sum + one, 0);
  const places = Array.from({ length: PLACES }, (_, place) => Math.floor((total * place) / PLACES));
  const pages = total ? await Promise.all([...new Set(places)].map((place) => getItems(place, LOOKED_AT).catch(() => []))) : [];
  const found = new Map();
  for (const page of pages) {
    if (found.size === MOST) break;
    const item = page.find((one) => one.image && !found.has(one.id));
    if (item) found.set(item.id, item);
  }
  find("shelf-part").hidden = found.size === 0;
  find("shelf").replaceChildren(...[...found.values()].map((item) => el("li", {}, picture(item, take))));
}

function picture(item, take) {
  const img = el("img", { alt: item.text?.slice(0, 200) || `picture ${item.id}`, class: "thumb" });
  shownPicture(img, itemPicture(item.id, item.text ?? "", item.image));
  return el("button", { type: "button", on: { click: () => take(item) } }, img);
}
