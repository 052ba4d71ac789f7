// Past searches, in this browser's localStorage. Pictures over a size are left out; a full store loses pictures, then the oldest.

import { el } from "./dom.js";
import { fromRecord, sayQuery } from "./query.js";
import { thumb } from "./reasoning.js";

const KEY = "traceir.history";
const MOST = 60;
export const PICTURE_CHARACTERS = 96 * 1024;

export function readHistory() {
  try {
    return JSON.parse(localStorage.getItem(KEY) ?? "[]").filter((one) => one !== null && typeof one === "object");
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

function toRecord({ text, instruction, modality, route, picture }) {
  const record = { when: Date.now(), text, instruction, modality, route };
  if (picture?.kind === "item") record.image = { item: picture.id, label: picture.label.slice(0, 200) };
  else if (picture) record.image = { data: picture.data, name: picture.name };
  return picture?.data?.length > PICTURE_CHARACTERS ? withoutPicture(record) : record;
}

const withoutPicture = ({ image, ...rest }) => ({ ...rest, left_out: image.name ?? "picture" });

function write(records) {
  try {
    localStorage.setItem(KEY, JSON.stringify(records));
  } catch {
    if (!records.length) return; // storage is forbidden: no history then
    const bare = records.findLastIndex((one) => one.image?.data);
    write(bare < 0 ? records.slice(0, -1) : records.with(bare, withoutPicture(records[bare])));
  }
}

// Fills a list with the past; `choose(query, left_out)` is called with the one that is pressed.
export function drawHistory(list, choose) {
  list.replaceChildren(...readHistory().map((record) => entry(record, choose)));
  if (!list.children.length) list.append(el("li", { class: "quiet", text: "Nothing yet." }));
}

function entry(record, choose) {
  const query = fromRecord(record);
  const about = [record.left_out ? "its picture was not kept" : "", query.route === "auto" ? "" : query.route, ago(record.when)];
  return el("li", {}, el("button", { type: "button", class: "row", on: { click: () => choose(query, record.left_out ?? "") } },
    thumb(query.picture), el("span", { class: "row-words" }, el("span", { dir: "auto", text: sayQuery(query) || "a picture" }),
      el("span", { class: "quiet", text: about.filter(Boolean).join(" · ") }))));
}

function ago(when) {
  if (!Number.isFinite(when)) return "";
  const minutes = Math.round((Date.now() - when) / 60000);
  if (minutes < 60) return minutes < 1 ? "just now" : `${minutes} min ago`;
  return new Date(when).toLocaleString([], { dateStyle: "medium", timeStyle: "short" });
}
