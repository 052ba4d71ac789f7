// What the page shows before the first search: what the server holds, examples, some pictures, or why there is nothing yet.

import { askJson, thumb } from "./api.js";
import { announce, button, el, find, plural, say } from "./dom.js";
import { NOUNS, fromRecord, itemPicture } from "./query.js";

const EMPTY_HELP = "traceir index add FOLDER --index DIR";
const SHELF = { pictures: 6, pages: 9, items: 24 }; // so many pictures at most, from so many pages of so many items
const code = (text) => el("code", { text });

// `choose(query)` runs an example, `take(hit)` begins with a picture of the collection.
export function drawLanding(config, choose, take) {
  const counts = Object.entries(config.count ?? {}).filter(([, count]) => count > 0);
  say(find("collection"), counts.map(([modality, count]) => plural(count, NOUNS[modality] ?? modality)).join(" · ") || "nothing indexed yet");
  find("home").setAttribute("aria-label", `${config.title}, start page`);
  if (!counts.length) {
    showNotice("The collection is empty", el("p", {}, "Add a folder of pictures and texts with ", code(EMPTY_HELP), ", or post them to ",
      code("/items"), ". Then load this page again."));
  } else if (config.world && config.instead.length) {
    showNotice("This model does not know your collection", el("div", {}, el("p", { dir: "auto", text: config.world }),
      el("p", { text: "Hits that mean something take a model that knows such things, for instance:" }),
      ...config.instead.map((command) => el("p", {}, code(command)))));
  } else if (config.world) {
    showNotice("What this model knows", config.world);
  } else {
    find("notice").hidden = true;
  }
  fill("examples", (config.examples ?? []).map((example) => drawExample(example, choose)));
  drawShelf(counts.reduce((sum, [, count]) => sum + count, 0), take);
}

// A list that is hidden with its heading while it is empty.
function fill(id, entries) {
  find(`${id}-part`).hidden = !entries.length;
  find(id).replaceChildren(...entries.map((entry) => el("li", {}, entry)));
}

function drawExample(example, choose) {
  const query = fromRecord(example);
  const words = el("span", {}, el("b", { dir: "auto", text: example.title }), el("span", { class: "asked", dir: "auto", text: query.text || query.instruction }));
  return button([thumb(query.picture), words], () => choose(query), { class: "example" });
}

// Pictures from all over the collection, to start from without a picture of one's own.
async function drawShelf(total, take) {
  const offsets = new Set(Array.from({ length: total && SHELF.pages }, (_, page) => Math.floor((total * page) / SHELF.pages)));
  const pages = await Promise.all([...offsets].map((offset) => askJson(`/items?offset=${offset}&limit=${SHELF.items}`).catch(() => ({}))));
  const items = new Map();
  for (const page of pages) {
    const item = page.items?.find(({ id, image }) => image && !items.has(id));
    if (item && items.size < SHELF.pictures) items.set(item.id, item);
  }
  fill("shelf", [...items.values()].map((item) =>
    button([thumb(itemPicture(item.id, "", item.image), item.text?.slice(0, 200) || `picture ${item.id}`)], () => take(item))));
}

// A message above the welcome; `retry` adds a button.
export function showNotice(title, body, retry = null) {
  announce(title);
  find("notice").hidden = false;
  find("notice").replaceChildren(el("h2", { text: title }), typeof body === "string" ? el("p", { dir: "auto", text: body }) : body,
    ...(retry ? [button("Try again", retry, { class: "strong" })] : []));
}
