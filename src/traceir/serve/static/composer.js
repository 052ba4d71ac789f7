// The search box: a picture by drop, paste or choice, words, instruction, modality, route.

import { announce, el, find, say, toast } from "./dom.js";
import { filePicture, itemPicture, kindOf, makeQuery } from "./query.js";
import { shownPicture } from "./reasoning.js";
import { DRAGGED } from "./results.js";

const LARGEST = 20 * 1024 * 1024;
const CHIPS = 8;
const READ = { "image/jpeg": "JPEG", "image/png": "PNG", "image/webp": "WebP", "image/gif": "GIF", "image/bmp": "BMP", "image/tiff": "TIFF" };
const PLAIN = "Describe what you look for, or add a picture and say what to change";
const CHANGE = "now make it …";

export class Composer {
  // actions: {search(query), stop()}
  constructor(actions) {
    this.actions = actions;
    this.picture = null;
    this.reading = 0;
    this.suggestions = [];
    this.largest = LARGEST;
    this.form = find("composer");
    this.text = find("text");
    this.instruction = find("instruction");
    this.listen();
    this.watchDrops();
  }

  listen() {
    this.form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.actions.search(this.query());
    });
    this.form.addEventListener("input", () => this.refresh());
    this.text.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      this.form.requestSubmit();
    });
    find("stop").addEventListener("click", () => this.actions.stop());
    find("file").addEventListener("change", (event) => {
      this.takeFiles([...event.target.files]);
      event.target.value = "";
    });
    find("remove").addEventListener("click", () => {
      this.setPicture(null);
      find("file").focus();
    });
    document.addEventListener("paste", (event) => this.onPaste(event));
  }

  onPaste(event) {
    const files = [...(event.clipboardData?.files ?? [])];
    if (!files.length || document.querySelector("dialog[open]")) return;
    event.preventDefault();
    this.takeFiles(files);
  }

  watchDrops() {
    let depth = 0;
    const overlay = (shown) => {
      depth = shown ? depth : 0;
      find("drop").hidden = !shown;
    };
    const fits = (event) => [...(event.dataTransfer?.types ?? [])].some((type) => type === "Files" || type === DRAGGED);
    addEventListener("dragenter", (event) => { if (fits(event)) { depth += 1; overlay(true); } });
    addEventListener("dragleave", (event) => { if (fits(event)) { depth -= 1; if (depth <= 0) overlay(false); } });
    addEventListener("dragover", (event) => { if (fits(event)) event.preventDefault(); });
    addEventListener("drop", (event) => {
      if (!fits(event)) return;
      event.preventDefault();
      overlay(false);
      const id = event.dataTransfer.getData(DRAGGED);
      if (id) this.setPicture(itemPicture(id));
      else this.takeFiles([...event.dataTransfer.files]);
      this.text.focus();
    });
    addEventListener("dragend", () => overlay(false));
  }

  // The first picture among files that came together.
  takeFiles(files) {
    const picture = files.find((one) => one.type in READ);
    if (picture) {
      if (files.length > 1) toast(`One picture at a time: “${picture.name}” was taken.`);
      return this.takeFile(picture);
    }
    if (!files.length) return null;
    const kinds = `Give a picture as ${Object.values(READ).join(", ")}.`;
    return this.complain(files.length > 1 ? `None of these ${files.length} files can be searched with. ${kinds}`
      : `“${files[0].name}” cannot be searched with. ${kinds}`);
  }

  // A file as the query's picture, sent as it is: what is searched with must be what was given.
  async takeFile(file) {
    if (file.size > this.largest) return this.complain(`“${file.name}” is larger than ${Math.round(this.largest / 1048576)} MB.`);
    const turn = ++this.reading;
    try {
      const data = await dataUrl(file);
      if (turn === this.reading) this.setPicture(filePicture(data, file.name || "picture"));
    } catch {
      this.complain(`“${file.name}” cannot be read.`);
    }
  }

  setPicture(picture) {
    this.reading += 1;
    const had = this.picture !== null;
    this.picture = picture;
    find("choose").hidden = picture !== null;
    find("chosen").hidden = picture === null;
    this.refresh();
    const fresh = el("img", { id: "preview", alt: "the picture to search with" });
    find("preview-lost").hidden = true;
    fresh.addEventListener("error", () => { find("preview-lost").hidden = false; });
    find("preview").replaceWith(fresh);
    if (picture) shownPicture(fresh, picture);
    const name = picture && (picture.kind === "item" ? picture.label || picture.id : picture.name);
    say(find("about-picture"), picture ? `with ${name}` : "Drop or paste a picture anywhere on this page.");
    if (picture || had) announce(picture ? `Picture added: ${name}` : "Picture removed");
  }

  query() {
    const chosen = (name) => this.form.elements[name].value;
    return makeQuery({ text: this.text.value, picture: this.picture, instruction: this.instruction.value,
      modality: chosen("modality"), route: chosen("route") });
  }

  setQuery(query) {
    this.text.value = query.text;
    this.instruction.value = query.instruction;
    // One by one: the `value` of a radio group does not take "".
    for (const one of this.form.querySelectorAll("input[type=radio]")) if (one.name in query) one.checked = one.value === query[one.name];
    this.setPicture(query.picture);
  }

  // Ready for "now make it ..." of a hit: its picture, no words; an instruction for another kind of query goes.
  refine(hit) {
    this.text.value = "";
    const known = this.suggestions.find((one) => one.text === this.instruction.value.trim());
    if (known?.query && known.query !== "image,text") this.instruction.value = "";
    this.setPicture(itemPicture(hit.id, hit.text ?? hit.id, hit.image));
    this.text.placeholder = CHANGE;
    this.text.focus();
    announce("This picture is the next query's. Say what to change.");
  }

  // What follows from the fields: placeholder, height, suggestions; and old complaints go.
  refresh() {
    this.complain("");
    this.text.placeholder = this.picture ? CHANGE : PLAIN;
    this.drawChips();
  }

  complain(text) {
    find("complaint").hidden = !text;
    say(find("complaint"), text);
  }

  setBusy(busy) {
    const held = document.activeElement === find(busy ? "go" : "stop");
    find("go").hidden = busy;
    find("stop").hidden = !busy;
    if (held) find(busy ? "stop" : "go").focus();
  }

  // instructions: strings, or {text, query?, target?} with the modalities they are meant for.
  setConfig({ instructions, limits }) {
    const read = (one) => (typeof one === "string" ? { text: one } : one);
    this.suggestions = (Array.isArray(instructions) ? instructions : []).map(read).filter((one) => typeof one?.text === "string");
    if (Number.isFinite(limits?.picture_bytes)) this.largest = limits.picture_bytes;
    const texts = [...new Set(this.suggestions.map((one) => one.text))];
    find("instructions").replaceChildren(...texts.map((text) => el("option", { value: text })));
    this.drawChips();
  }

  // The suggestions that fit this kind of query and the modality looked for.
  drawChips() {
    const query = this.query();
    const kind = kindOf(query);
    // A picture without words yet will most likely get some.
    const kinds = query.picture ? (query.text ? [kind] : ["image,text", "image"]) : [kind];
    const fits = (one) => (!one.query || kinds.includes(one.query)) && (!one.target || !query.modality || one.target === query.modality);
    const texts = [...new Set(this.suggestions.filter(fits).map((one) => one.text))].slice(0, CHIPS);
    const key = JSON.stringify([texts, query.instruction]);
    if (find("chips").dataset.key === key) return;
    find("chips").dataset.key = key;
    find("chips").hidden = !texts.length;
    find("chips").replaceChildren(...texts.map((text) => this.chip(text, query.instruction === text)));
  }

  chip(text, chosen) {
    return el("button", { type: "button", class: "chip", "aria-pressed": String(chosen), dir: "auto", text, on: { click: () => {
      this.instruction.value = chosen ? "" : text;
      this.refresh();
      [...find("chips").children].find((one) => one.textContent === text)?.focus();
    } } });
  }
}

function dataUrl(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.addEventListener("load", () => resolve(reader.result));
    reader.addEventListener("error", () => reject(reader.error));
    reader.readAsDataURL(file);
  });
}
