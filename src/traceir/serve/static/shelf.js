// Some pictures of the collection, to start from without a picture of one's own.

import { getItems } from "./api.js";
import { el, find } from "./dom.js";
import { itemPicture } from "./query.js";
import { thumb } from "./reasoning.js";

const MOST = 6;
const PLACES = 9;
const LOOKED_AT = 24;

// Shows pictures from all over the collection; `take(hit)` is called with the one that is pressed. Where there are none, nothing is shown.
export async function drawShelf(count, take) {
  const total = Object.values(count).reduce((sum, one) => sum + one, 0);
  const places = new Set(Array.from({ length: total && PLACES }, (_, place) => Math.floor((total * place) / PLACES)));
  const pages = await Promise.all([...places].map((place) => getItems(place, LOOKED_AT).catch(() => [])));
  const items = new Map();
  for (const page of pages) {
    const item = page.find((one) => one.image && !items.has(one.id));
    if (item && items.size < MOST) items.set(item.id, item);
  }
  find("shelf-part").hidden = items.size === 0;
  find("shelf").replaceChildren(...[...items.values()].map((item) => el("li", {}, el("button", { type: "button", on: { click: () => take(item) } },
    thumb(itemPicture(item.id, "", item.image), item.text?.slice(0, 200) || `picture ${item.id}`)))));
}
