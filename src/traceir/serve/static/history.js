// Past searches, in this browser's localStorage. Pictures over a size are left out; a full store loses pictures, then the oldest.

import { el } from "./dom.js";
import { fromRecord, makeQuery, sayQuery } from "./query.js";
import { shownPicture } from "./reasoning.js";

const KEY = "traceir.history";
const MOST = 60;
export const PICTURE_CHARACTERS = 96 * 1024;

export function readHistory() {
  try {
    const read = JSON.parse(localStorage.getItem(KEY) ?? "[]");
    return Array.isArray(read) ? read.filter((one) => one !== null && typeof one === "object") : [];
  } catch {
    return []; // not ours, or storage is forbidden
  }
}

export function remember(query) {
  const fresh = toRecord(query);
  const same = (one) => JSON.stringify({ ...one, when: 0 }) === JSON.stringify({ ...fresh, when: 0 });
  write([fresh, ...readHistory().filter((one) => !same(one))].slice(0, MOST));
}

export const clearHistory = () => localStorage.removeItem(KEY);

function toRecord(query) {
  const { text, instruction, modality, route, picture } = query;
  const record = { when: Date.now(), text, instruction, modality, route };
  if (picture?.kind === "item") record.image = { item: picture.id, label: picture.label.slice(0, 200) };
  else if (picture && picture.data.length <= PICTURE_CHARACTERS) record.image = { data: picture.data, name: picture.name };
  else if (picture) record.left_out = picture.name;
  return record;
}

function write(records) {
  for (let kept = records; ; ) {
    try {
      localStorage.setItem(KEY, JSON.stringify(kept));
      return;
    } catch {
      if (!kept.length) return; // storage is forbidden: no history then
      const bare = kept.findLastIndex((one) => one.image?.data);
      kept = bare < 0 ? kept.slice(0, -1) : kept.map((one, at) => (at === bare ? withoutPicture(one) : one));
    }
  }
}

function withoutPicture(record) {
  const { image, ...rest } = record;
  return { ...rest, left_out: image.name ?? "picture" };
}

// Fills a list with the past; `choose(query, left_out)` is called with the one that is pressed.
export function drawHistory(list, choose) {
  const records = readHistory();
  list.replaceChildren(...records.map((record) => entry(record, choose)));
  if (!records.length) list.append(el("li", { class: "quiet", text: "Nothing yet." }));
}

function entry(record, choose) {
  const query = record.image ? fromRecord(record) : makeQuery(record);
  const img = query.picture ? el("img", { alt: "", class: "thumb" }) : null;
  if (img) shownPicture(img, query.picture);
  const about = [record.left_out ? "its picture was not kept" : "", query.route === "auto" ? "" : query.route, ago(record.when)];
  return el("li", {}, el("button", { type: "button", class: "row", on: { click: () => choose(query, record.left_out ?? "") } },
    img, el("span", { class: "row-words" }, el("span", { dir: "auto", text: sayQuery(query) || "a picture" }),
      el("span", { class: "quiet", text: about.filter(Boolean).join(" · ") }))));
}

function ago(when) {
  if (!Number.isFinite(when)) return "";
  const minutes = Math.round((Date.now() - when) / 60000);
  if (minutes < 1) return "just now";
  if (minutes < 60) return `${minutes} min ago`;
  return new Date(when).toLocaleString([], { dateStyle: "medium", timeStyle: "short" });
}
