// The search box: a picture by drop, paste or choice, words, instruction, modality, route; and the cut-off, a setting of the page.

import { showQueryPicture } from "./api.js";
import { announce, button, el, find, onClick, say, sayRate, toast } from "./dom.js";
import { filePicture, hitPicture, itemPicture, kindOf, makeQuery } from "./query.js";
import { DRAGGED } from "./results.js";

const LARGEST = 20 * 1024 * 1024;
const CHIPS = 8;
const RATES = [0, 0.1, 0.01, 0.001]; // of the cut-off; 0 is none
const READ = { "image/jpeg": "JPEG", "image/png": "PNG", "image/webp": "WebP", "image/gif": "GIF", "image/bmp": "BMP", "image/tiff": "TIFF" };
const PLAIN = "Describe what you look for, or add a picture and say what to change";
const CHANGE = "now make it …";

export class Composer {
  picture = null;
  reading = 0; // counts what became of the picture, so that a file that is read late does not take its place
  calibrated = {}; // the kinds of query that a cut-off can be told for
  form = find("composer");
  text = find("text");
  instruction = find("instruction");

  // actions: {search(query), stop()}
  constructor({ search, stop }) {
    this.form.addEventListener("submit", (event) => {
      event.preventDefault();
      search(this.query());
    });
    this.form.addEventListener("input", () => this.refresh());
    this.text.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      this.form.requestSubmit();
    });
    onClick("stop", stop);
    find("file").addEventListener("change", (event) => {
      this.takeFiles([...event.target.files]);
      event.target.value = "";
    });
    onClick("remove", () => {
      this.setPicture(null);
      find("file").focus();
    });
    document.addEventListener("paste", (event) => {
      const files = [...(event.clipboardData?.files ?? [])];
      if (!files.length || document.querySelector("dialog[open]")) return;
      event.preventDefault();
      this.takeFiles(files);
    });
    this.watchDrops();
  }

  // While something is dragged over the page, a sheet lies over all of it and takes the drop.
  watchDrops() {
    const show = (shown) => { find("drop").hidden = !shown; };
    const when = (kind, act) => addEventListener(kind, (event) => {
      if ([...(event.dataTransfer?.types ?? [])].some((type) => type === "Files" || type === DRAGGED)) act(event);
    });
    when("dragenter", () => show(true));
    when("dragleave", (event) => { if (event.target === find("drop")) show(false); });
    when("dragover", (event) => event.preventDefault());
    when("drop", (event) => {
      event.preventDefault();
      show(false);
      const id = event.dataTransfer.getData(DRAGGED);
      if (id) this.setPicture(itemPicture(id));
      else this.takeFiles([...event.dataTransfer.files]);
      this.text.focus();
    });
    addEventListener("dragend", () => show(false));
  }

  // The first picture among files that came together, sent as it is: what is searched with must be what was given.
  takeFiles(files) {
    const file = files.find(({ type }) => type in READ);
    if (!files.length) return;
    if (!file) {
      const which = files.length > 1 ? `None of these ${files.length} files can` : `“${files[0].name}” cannot`;
      this.complain(`${which} be searched with. Give a picture as ${Object.values(READ).join(", ")}.`);
    } else if (file.size > LARGEST) {
      this.complain(`“${file.name}” is larger than ${LARGEST / 1048576} MB.`);
    } else {
      if (files.length > 1) toast(`One picture at a time: “${file.name}” was taken.`);
      const reader = new FileReader();
      const turn = ++this.reading;
      reader.onload = () => { if (turn === this.reading) this.setPicture(filePicture(reader.result, file.name || "picture")); };
      reader.onerror = () => this.complain(`“${file.name}” cannot be read.`);
      reader.readAsDataURL(file);
    }
  }

  setPicture(picture) {
    this.reading += 1;
    const had = this.picture !== null;
    this.picture = picture;
    find("choose").hidden = picture !== null;
    find("chosen").hidden = picture === null;
    this.refresh();
    const lost = find("preview-lost");
    lost.hidden = true;
    const fresh = el("img", { id: "preview", alt: "the picture to search with", on: { error: () => { lost.hidden = false; } } });
    find("preview").replaceWith(fresh);
    if (picture) showQueryPicture(fresh, picture);
    const name = picture && (picture.kind === "item" ? picture.label || picture.id : picture.name);
    say(find("about-picture"), picture ? `with ${name}` : "Drop or paste a picture anywhere on this page.");
    if (picture || had) announce(picture ? `Picture added: ${name}` : "Picture removed");
  }

  query() {
    const { modality, route } = this.form.elements;
    return makeQuery({ text: this.text.value, picture: this.picture, instruction: this.instruction.value, modality: modality.value, route: route.value });
  }

  setQuery(query) {
    this.text.value = query.text;
    this.instruction.value = query.instruction;
    // One by one: the `value` of a radio group does not take "".
    for (const radio of this.form.querySelectorAll("input[type=radio]")) if (radio.name in query) radio.checked = radio.value === query[radio.name];
    this.setPicture(query.picture);
  }

  // Ready for "now make it ..." of a hit: its picture, no words.
  refine(hit) {
    this.text.value = "";
    this.setPicture(hitPicture(hit));
    this.text.focus();
    announce("This picture is the next query's. Say what to change.");
  }

  // What follows from the fields: placeholder, chosen suggestion; and old complaints go.
  refresh() {
    this.complain("");
    this.text.placeholder = this.picture ? CHANGE : PLAIN;
    this.markChips();
  }

  markChips() {
    for (const chip of find("chips").children) chip.ariaPressed = String(chip.textContent === this.instruction.value.trim());
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

  setInstructions(instructions) {
    const suggestions = [...new Set(instructions)];
    const toggle = (text) => {
      this.instruction.value = this.instruction.value.trim() === text ? "" : text;
      this.refresh();
    };
    find("instructions").replaceChildren(...suggestions.map((value) => el("option", { value })));
    find("chips").replaceChildren(...suggestions.slice(0, CHIPS).map((text) => button(text, () => toggle(text), { class: "chip", dir: "auto" })));
    find("chips").hidden = !suggestions.length;
    this.markChips();
  }

  // How often a query whose answer is not here may be shown hits all the same: a rate, 0 for no cut-off, null where the server decides
  // because it cannot tell for this kind of query.
  cutoffFor(query) {
    return kindOf(query) in this.calibrated ? Number(this.form.elements.cutoff.value) : null;
  }

  // `config`: {default, background}. Rates that the background cannot tell are not offered; without a background nothing is.
  setCutoff(config) {
    this.calibrated = config?.background ?? {};
    const most = Math.max(0, ...Object.values(this.calibrated));
    const own = config?.default ?? 0;
    find("cutoff").hidden = most === 0;
    find("rates").replaceChildren(...[...new Set([...RATES, own])].map((value) => {
      const disabled = value > 0 && value !== own && value * (most + 1) < 1;
      const radio = el("input", { type: "radio", name: "cutoff", value, disabled, checked: value === own });
      return el("label", { title: value ? null : "Always show the nearest" }, radio, el("span", { text: value ? sayRate(value) : "Off" }));
    }));
  }
}
