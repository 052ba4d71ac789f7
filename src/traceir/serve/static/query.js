// A query of the page, never changed once made; and the queries of the past. Without text, picture and instruction it looks through the
// collection. picture: null, {kind: "file", data: "data:image/...", name} or {kind: "item", id, label, path}; a null path is looked up.
// modality: "" is any; where, sort: "" is none; fold, cutoff: null is the page's and the server's own. terms: [{weight, text} or {weight, id}].

import { thumb } from "./api.js";
import { announce, button, el, find, onClick, openDialog } from "./dom.js";

const HISTORY = "traceir.history";
const MOST = 60; // queries of the past
export const NOUNS = { image: "picture", text: "text", "image,text": "pair" };

export function makeQuery({ text, instruction, modality, route, picture, mode, where, sort, fold, cutoff, terms }) {
  const trimmed = (value) => String(value ?? "").trim();
  return Object.freeze({
    text: trimmed(text), instruction: trimmed(instruction), where: trimmed(where), sort: trimmed(sort),
    modality: Object.hasOwn(NOUNS, modality ?? "") ? modality : "",
    route: ["reason", "direct"].includes(route) ? route : "auto",
    mode: ["keyword", "hybrid"].includes(mode) ? mode : "vector",
    fold: typeof fold === "boolean" ? fold : null,
    cutoff: Number.isFinite(cutoff) && cutoff >= 0 && cutoff < 1 ? cutoff : null,
    terms: (Array.isArray(terms) ? terms : []).filter(({ weight, text: words, id }) => Number.isFinite(weight) && weight && (words || id)),
    picture: picture ?? null,
  });
}

export const itemPicture = (id, label = "", path = null) => Object.freeze({ kind: "item", id, label, path });
export const hitPicture = (hit) => itemPicture(hit.id, hit.text ?? hit.id, hit.image);
export const filePicture = (data, name = "picture") => Object.freeze({ kind: "file", data, name });

// Whether it only looks through the collection, and whether not even that.
export const browses = (query) => !query.text && !query.picture && !query.instruction;
export const isEmpty = (query) => browses(query) && !query.where && !query.sort;

// The modality of the query itself.
export const kindOf = (query) => (query.picture ? (query.text ? "image,text" : "image") : "text");

export const samePicture = (mine, other) => mine && other && mine.kind === other.kind && (mine.id ?? mine.data) === (other.id ?? other.data);
// Those of its fields that say something; what they say by default.
const DEFAULTS = { text: "", instruction: "", modality: "", where: "", sort: "", route: "auto", mode: "vector", fold: null, cutoff: null };
const filled = (query, names = Object.keys(DEFAULTS)) => Object.fromEntries(names.filter((name) => query[name] !== DEFAULTS[name]).map((name) => [name, query[name]]));

// The body of POST /search and POST /search/stream; `how`: k, offset or after, and what the page decides.
export function toRequest(query, { fold, cutoff, ...how }) {
  const body = { ...filled(query, ["text", "instruction", "modality", "where", "sort", "mode"]), route: query.route, ...how };
  if (cutoff !== null) body.cutoff = cutoff;
  if (fold) body.fold = true;
  if (query.terms.length && query.mode !== "keyword") body.terms = query.terms.map(({ weight, text, id }) => ({ weight, ...(id ? { image: { item: id } } : { text }) }));
  if (query.picture) body.image = query.picture.kind === "item" ? { item: query.picture.id } : { data: query.picture.data };
  return body;
}

// The path of a page of GET /items, for a query that only looks through the collection.
export function toPath({ where, sort, modality }, { limit, after }) {
  const kind = modality && `modality="${modality}"`;
  const parts = { where: where && kind ? `(${where}) and ${kind}` : where || kind, sort, after };
  return `/items?${new URLSearchParams([["limit", limit], ...Object.entries(parts).filter(([, value]) => value)])}`;
}

// The query as the hash of an address; null where it has a picture that only this page holds.
export function toHash(query) {
  if (query.picture?.kind === "file") return null;
  const parts = new URLSearchParams(filled(query));
  if (query.picture) parts.set("item", query.picture.id);
  for (const { weight, text, id } of query.terms) parts.append("term", `${weight}:${id ? `item:${id}` : `text:${text}`}`);
  return `#${parts}`;
}

// The query of an address, or null where its hash holds none.
export function fromHash(hash) {
  const parts = new URLSearchParams(hash.replace(/^#/, ""));
  const item = parts.get("item");
  const terms = parts.getAll("term").map((term) => /^([-+.\d]+):(text|item):(.+)$/s.exec(term)).filter(Boolean)
    .map(([, weight, kind, value]) => ({ weight: Number(weight), [kind === "item" ? "id" : "text"]: value }));
  const fold = { true: true, false: false }[parts.get("fold")];
  const cutoff = parts.has("cutoff") ? Number(parts.get("cutoff")) : null;
  const query = makeQuery({ ...Object.fromEntries(parts), fold, cutoff, terms, picture: item ? itemPicture(item) : null });
  return isEmpty(query) ? null : query;
}

export function sayQuery(query) {
  const words = query.text || query.instruction || (query.picture ? "" : query.where || "everything");
  return query.picture ? (words ? `picture + ${words}` : "by picture") : words;
}

// The past is in this browser's localStorage, as addresses; so a picture that only this page holds is not kept.
function readHistory() {
  try {
    return JSON.parse(localStorage.getItem(HISTORY) ?? "[]").filter((record) => typeof record?.hash === "string" && fromHash(record.hash));
  } catch {
    return []; // not ours, or storage is forbidden
  }
}

export function remember(query) {
  const hash = toHash(query);
  const others = readHistory().filter((record) => record.hash !== hash);
  try {
    if (hash) localStorage.setItem(HISTORY, JSON.stringify([{ when: Date.now(), hash }, ...others].slice(0, MOST)));
  } catch {
    // Storage is full or forbidden: no history then.
  }
}

// The dialog of the past; `choose(query)` is called with the one that is pressed.
export function watchHistory(choose) {
  const draw = () => {
    const entries = readHistory().map(({ hash, when }) => el("li", {}, entry(fromHash(hash), when, choose)));
    find("past").replaceChildren(...(entries.length ? entries : [el("li", { class: "quiet", text: "Nothing yet." })]));
  };
  onClick("open-history", () => { draw(); openDialog(find("history")); });
  onClick("clear-history", () => {
    localStorage.removeItem(HISTORY);
    draw();
    announce("History cleared");
  });
}

function entry(query, when, choose) {
  const about = [query.route === "auto" ? "" : query.route, query.text && query.where, ago(when)].filter(Boolean).join(" · ");
  const words = el("span", { class: "row-words" }, el("span", { dir: "auto", text: sayQuery(query) || "a picture" }), el("span", { class: "quiet", text: about }));
  return button([thumb(query.picture), words], () => { find("history").close(); choose(query); }, { class: "row" });
}

function ago(when) {
  if (!Number.isFinite(when)) return "";
  const minutes = Math.round((Date.now() - when) / 60000);
  if (minutes < 60) return minutes < 1 ? "just now" : `${minutes} min ago`;
  return new Date(when).toLocaleString([], { dateStyle: "medium", timeStyle: "short" });
}
