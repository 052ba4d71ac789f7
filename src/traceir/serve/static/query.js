// A query of the page: {text, picture, instruction, modality, route}, never changed once made.
//
// picture: null, {kind: "file", data: "data:image/...", name} or {kind: "item", id, label, path}; a null path is looked up. modality: "" is any.

const ROUTES = ["auto", "reason", "direct"];
export const NOUNS = { image: "picture", text: "text", "image,text": "pair" };

export function makeQuery({ text, instruction, modality, route, picture }) {
  return Object.freeze({
    text: String(text ?? "").trim(),
    instruction: String(instruction ?? "").trim(),
    modality: Object.hasOwn(NOUNS, modality ?? "") ? modality : "",
    route: ROUTES.includes(route) ? route : "auto",
    picture: picture ?? null,
  });
}

export const EMPTY = makeQuery({});

export const itemPicture = (id, label = "", path = null) => Object.freeze({ kind: "item", id, label, path });
export const filePicture = (data, name = "picture") => Object.freeze({ kind: "file", data, name });

export const isEmpty = (query) => !query.text && !query.picture && !query.instruction;

// The modality of the query itself.
export const kindOf = (query) => (query.picture ? (query.text ? "image,text" : "image") : "text");

export const samePicture = (one, other) => one && other && one.kind === other.kind && (one.id ?? one.data) === (other.id ?? other.data);

// Those of its fields that say something.
const given = ({ text, instruction, modality }) => Object.entries({ text, instruction, modality }).filter(([, value]) => value);

// The body of POST /search and POST /search/stream.
export function toRequest(query, { k, offset = 0, route = query.route, cutoff = null }) {
  const body = { route, k, offset, ...Object.fromEntries(given(query)) };
  if (cutoff !== null) body.cutoff = cutoff;
  if (query.picture) body.image = query.picture.kind === "item" ? { item: query.picture.id } : { data: query.picture.data };
  return body;
}

// The query as the hash of an address; null where it has a picture that only this page holds.
export function toHash(query) {
  if (query.picture?.kind === "file") return null;
  const parts = new URLSearchParams(given(query));
  if (query.picture) parts.set("item", query.picture.id);
  if (query.route !== "auto") parts.set("route", query.route);
  return `#${parts}`;
}

// The query of an address, or null where its hash holds none.
export function fromHash(hash) {
  const parts = new URLSearchParams(hash.replace(/^#/, ""));
  const item = parts.get("item");
  const query = makeQuery({ ...Object.fromEntries(parts), picture: item ? itemPicture(item) : null });
  return isEmpty(query) ? null : query;
}

// An example of /page/config, or an entry of the history, whose picture is {"item": id}, {"data": "data:..."} or missing.
export function fromRecord(record) {
  const { image } = record;
  let picture = null;
  if (typeof image?.item === "string") picture = itemPicture(image.item, image.label ?? "");
  else if (typeof image?.data === "string" && image.data.startsWith("data:image/")) picture = filePicture(image.data, image.name);
  return makeQuery({ ...record, picture });
}

// In words, for labels and titles.
export function sayQuery(query) {
  const words = query.text || query.instruction;
  return query.picture ? (words ? `picture + ${words}` : "by picture") : words;
}
