// The search box: a picture by drop, paste or choice, words, instruction, modality, route; and what narrows, orders and weighs.

import { askJson, showQueryPicture } from "./api.js";
import { announce, button, el, find, icon, onClick, sayRate, tell, toast } from "./dom.js";
import { conditionsOf, joined, rangeOf, suggestionsFor, withRange } from "./filters.js";
import { browses, filePicture, kindOf, makeQuery } from "./query.js";

const RATES = [0, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005, 0.002, 0.001]; // of the cut-off; 0 is none
const WEIGHTS = [0.25, 0.5, 1, 2]; // of a term

export class Composer {
  picture = null;
  reading = 0; // counts what became of the picture, so that a file that is read late does not take its place
  config = {};
  rates = [0];
  ready = new Promise((resolve) => { this.isReady = resolve; }); // once the server has said what it takes
  facets = [];
  where = ""; // the filter as it was applied; a wrong one stays in its field
  terms = [];
  ownRate = 0;
  form = find("composer");
  text = find("text");
  complain = (text) => tell(find("complaint"), text);
  query = () => makeQuery({ ...this.controls(), text: this.text.value, picture: this.picture });

  // actions: {search(query), apply(): a control was changed, stop()}
  constructor({ search, apply, stop }) {
    this.apply = apply;
    this.setSort("");
    onClick("stop", stop);
    onClick("open-panel", () => this.openPanel(find("panel").hidden));
    onClick("remove", () => { this.setPicture(null); find("file").focus(); });
    onClick("more-of", () => this.addTyped(1));
    onClick("less-of", () => this.addTyped(-1));
    this.form.addEventListener("submit", (event) => {
      event.preventDefault();
      search(this.query());
    });
    this.form.addEventListener("input", ({ target }) => {
      this.complain("");
      if (target.type !== "date") this.refresh(); // it would take back what is being picked
      if (target.id === "where") suggest("filters", suggestionsFor(target.value, this.facets));
    });
    this.form.addEventListener("change", ({ target }) => this.changed(target));
    const entered = { text: () => this.form.requestSubmit(), where: () => this.setWhere(find("where").value), term: () => this.addTyped(1) };
    this.form.addEventListener("keydown", (event) => {
      const { key, target, shiftKey, isComposing } = event;
      if (key !== "Enter" || isComposing || !Object.hasOwn(entered, target.id) || (shiftKey && target === this.text)) return;
      event.preventDefault();
      entered[target.id]();
    });
    document.addEventListener("paste", (event) => {
      const files = [...(event.clipboardData?.files ?? [])];
      if (!files.length || document.querySelector("dialog[open]")) return;
      event.preventDefault();
      this.takeFiles(files);
    });
    for (const kind of ["dragenter", "dragover", "dragleave", "drop"]) addEventListener(kind, (event) => this.drag(event));
  }

  // While files are dragged over the page, a sheet lies over all of it and takes the drop.
  drag(event) {
    const { type, target, dataTransfer } = event;
    if (!dataTransfer?.types.includes("Files")) return;
    event.preventDefault();
    find("drop").hidden = type === "drop" || (type === "dragleave" && target === find("drop"));
    if (type !== "drop") return;
    this.takeFiles([...dataTransfer.files]);
    this.text.focus();
  }

  changed(control) {
    if (control.type === "radio" || ["sort", "fold", "cutoff"].includes(control.id)) this.applied();
    else if (control.id === "where") this.setWhere(control.value);
    else if (control.type === "date") {
      const where = find("where").ariaInvalid ? this.where : find("where").value; // which may be on its way still
      this.setWhere(joined(withRange(conditionsOf(where), this.date, [find("from").value, find("to").value])));
    } else if (control.type === "file") {
      this.takeFiles([...control.files]);
      control.value = "";
    }
  }

  openPanel(open) {
    find("panel").hidden = !open;
    find("open-panel").ariaExpanded = String(open);
  }

  applied() {
    this.refresh();
    this.apply();
  }

  // Applies a filter, unless the server cannot read it, which it says beneath.
  async setWhere(text) {
    const where = text.trim();
    find("where").value = where;
    if (where === this.where) return this.blame("");
    try {
      if (where) await askJson(`/items?${new URLSearchParams({ limit: 1, where })}`);
    } catch (error) {
      return this.blame(error.message);
    }
    if (find("where").value.trim() !== where) return null; // another came after it
    this.where = where;
    this.blame("");
    return this.applied();
  }

  blame(message) {
    if (message) this.openPanel(true);
    find("where").ariaInvalid = message ? "true" : null;
    tell(find("where-error"), message.replace(/^where: /, ""));
  }

  setTerms(terms) { this.terms = terms; this.applied(); }

  // More (1) or less (-1) of {text} or {id, label}, whatever it weighed before.
  addTerm(sign, what) {
    this.setTerms([...this.terms.filter(({ id, text }) => id !== what.id || text !== what.text), { weight: sign * 0.5, ...what }]);
  }

  addTyped(sign) {
    const text = find("term").value.trim();
    find("term").value = "";
    if (text) this.addTerm(sign, { text });
  }

  // The first picture among files that came together, sent as it is: what is searched with must be what was given.
  async takeFiles(files) {
    await this.ready;
    const { types, suffixes, most_bytes: most = Infinity } = this.config.pictures;
    const file = files.find(({ type, name }) => type in types || suffixes.some((suffix) => name.toLowerCase().endsWith(suffix)));
    if (!files.length) return;
    if (!file) {
      const which = files.length > 1 ? `None of these ${files.length} files can` : `“${files[0].name}” cannot`;
      this.complain(`${which} be searched with. Give a picture as ${Object.values(types).join(", ")}.`);
    } else if (file.size > most) {
      this.complain(`“${file.name}” has ${(file.size / 1048576).toFixed(1)} MB, more than the ${most / 1048576} MB that this server takes. Make it smaller.`);
    } else {
      if (files.length > 1) toast(`One picture at a time: “${file.name}” was taken.`);
      const reader = new FileReader();
      const turn = ++this.reading;
      reader.onload = () => { if (turn === this.reading) this.check(filePicture(reader.result, file.name || "picture")); };
      reader.onerror = () => this.complain(`“${file.name}” cannot be read.`);
      reader.readAsDataURL(file);
    }
  }

  // Shows the picture, and takes it back where the server says that it cannot search with it.
  async check(picture) {
    this.setPicture(picture);
    try {
      await askJson("/v1/pictures", { image: { data: picture.data } });
    } catch ({ status, message }) {
      if (this.picture !== picture || (status !== 400 && status !== 413)) return; // anything else is told by the search
      this.setPicture(null);
      this.complain(`“${picture.name}” cannot be searched with: ${message.replace(/^image:? /, "")}`);
    }
  }

  setPicture(picture) {
    this.reading += 1;
    const name = picture && (picture.name ?? (picture.label || picture.id));
    if (picture || this.picture) announce(picture ? `Picture added: ${name}` : "Picture removed");
    this.picture = picture;
    this.complain("");
    this.refresh();
    find("choose").hidden = picture !== null;
    find("chosen").hidden = picture === null;
    const fresh = el("img", { id: "preview", alt: "the picture to search with" });
    find("preview").replaceWith(picture ? showQueryPicture(fresh, picture) : fresh);
    tell(find("about-picture"), picture && `with ${name}`);
  }

  // All but the words and the picture.
  controls() {
    const { modality, mode, route, sort, instruction, fold, cutoff } = this.form.elements;
    const rate = this.rates[cutoff.valueAsNumber];
    return {
      modality: modality.value, mode: mode.value, route: route.value, sort: sort.value, instruction: instruction.value, where: this.where, terms: this.terms,
      fold: fold.checked === Boolean(this.config.fold) ? null : fold.checked,
      cutoff: cutoff.disabled || rate === this.ownRate ? null : rate,
    };
  }

  setQuery(query) {
    this.text.value = query.text;
    find("instruction").value = query.instruction;
    // One by one: the `value` of a radio group does not take "".
    for (const radio of this.form.querySelectorAll("input[type=radio]")) radio.checked = radio.value === query[radio.name];
    this.setSort(query.sort);
    Object.assign(this, { where: query.where, terms: query.terms });
    find("where").value = query.where;
    this.blame("");
    this.setDecisions(query);
    this.setPicture(query.picture);
  }

  // Without dates there is nothing to sort by them; a field that an address names is offered beside the usual ones.
  setSort(chosen) {
    const [date, hidden] = [this.date ?? "date", !this.date];
    const named = this.facets.some(({ name }) => name === "name");
    const ways = [["", "Relevance"], [`-${date}`, "Newest first", hidden], [date, "Oldest first", hidden], [named ? "name" : "id", "Name"]];
    if (!ways.some(([value]) => value === chosen)) ways.push([chosen, chosen]);
    find("sort").replaceChildren(...ways.map(([value, text, isHidden]) => el("option", { value, text, hidden: isHidden, selected: value === chosen })));
  }

  // What follows from the fields: placeholder, chips, dates.
  refresh() {
    this.text.placeholder = this.picture ? "now make it …" : "Describe what you look for, or add a picture";
    const conditions = conditionsOf(this.where);
    [find("from").value, find("to").value] = this.date ? rangeOf(conditions, this.date) : ["", ""];
    const { route, cutoff, instruction } = this.query();
    const resets = (text, name, value) => this.chip(text, () => { this.form.elements[name].value = value; this.applied(); });
    const chips = [
      ...conditions.map((one, place) => this.chip(one, () => this.setWhere(joined(conditions.toSpliced(place, 1))))),
      ...this.terms.map((term) => this.termChip(term)),
      instruction && resets(instruction, "instruction", ""),
      route !== "auto" && resets(`route: ${route}`, "route", "auto"),
      cutoff !== null && resets(`cut-off: ${sayCutoff(cutoff)}`, "cutoff", this.rates.indexOf(this.ownRate)),
    ].filter(Boolean);
    find("on").hidden = !chips.length;
    find("on").replaceChildren(...chips);
    const rate = this.rates[find("cutoff").valueAsNumber];
    find("cutoff-says").value = sayCutoff(rate);
    find("cutoff").ariaValueText = rate ? `${sayRate(rate)} false alarms` : "off";
  }

  // Something that is on, and the button that ends it.
  chip(text, remove, ...more) {
    const gone = () => { find("open-panel").focus(); remove(); };
    return el("li", { class: "chip on" }, el("span", { class: "chip-words", dir: "auto", title: text, text }), ...more,
      button(icon("cross"), gone, { class: "round", "aria-label": `Remove ${text}` }));
  }

  termChip(term) {
    const change = (by) => this.setTerms(this.terms.map((other) => (other === term ? { ...term, weight: by } : other)));
    const name = term.text ?? term.label ?? term.id.split("/").at(-1);
    const most = Math.abs(term.weight);
    const weights = el("select", { "aria-label": `Weight of ${name}`, on: { change: ({ target }) => change(Math.sign(term.weight) * Number(target.value)) } },
      ...[...new Set([...WEIGHTS, most])].sort((first, second) => first - second).map((value) => el("option", { value, text: `×${value}`, selected: value === most })));
    const [sign, label] = term.weight > 0 ? ["+", "More"] : ["−", "Less"];
    const chip = this.chip(name, () => this.setTerms(this.terms.filter((other) => other !== term)), weights);
    chip.prepend(button(sign, () => change(-term.weight), { class: "round sign", "aria-label": `${label} of ${name}; turn round` }));
    chip.classList.toggle("less", term.weight < 0);
    return chip;
  }

  setBusy(busy) {
    const held = document.activeElement === find(busy ? "go" : "stop");
    find("go").hidden = busy;
    find("stop").hidden = !busy;
    if (held) find(busy ? "stop" : "go").focus();
  }

  // `facets`: of the collection.
  setFacets(facets) {
    this.facets = facets;
    const dates = facets.filter(({ kind }) => kind === "date").map(({ name }) => name);
    this.date = dates.includes("date") ? "date" : dates[0];
    find("dates").hidden = !this.date;
    this.setSort(find("sort").value);
    this.refresh();
  }

  // How often a query whose answer is not here may be shown hits all the same (a rate, 0 for no cut-off, null where the server decides
  // because it cannot tell for this kind of query, or words alone rank), and whether hits are folded.
  decisionsFor(query) {
    const judges = kindOf(query) in (this.config.cutoff?.background ?? {}) && query.mode !== "keyword" && !browses(query);
    return { cutoff: judges ? query.cutoff ?? this.ownRate : null, fold: query.fold ?? Boolean(this.config.fold) };
  }

  setConfig(config) {
    this.config = config;
    this.isReady();
    find("file").accept = [...Object.keys(config.pictures.types), ...config.pictures.suffixes].join(",") || "image/*";
    suggest("instructions", config.instructions);
    // Rates that the background cannot tell are not offered; without a background nothing is.
    const most = Math.max(0, ...Object.values(config.cutoff.background));
    this.ownRate = config.cutoff.default ?? 0;
    this.rates = [...new Set([...RATES.filter((rate) => !rate || rate * (most + 1) >= 1), this.ownRate])].sort((first, second) => (second || 1) - (first || 1));
    Object.assign(find("cutoff"), { max: this.rates.length - 1, disabled: most === 0 });
    this.setDecisions({ fold: null, cutoff: null });
    this.refresh();
  }

  setDecisions({ fold, cutoff }) {
    find("fold").checked = fold ?? Boolean(this.config.fold);
    const away = (rate) => Math.abs(rate - (cutoff ?? this.ownRate));
    find("cutoff").value = this.rates.reduce((best, rate, place) => (away(rate) < away(this.rates[best]) ? place : best), 0);
  }
}

const sayCutoff = (rate) => (rate ? sayRate(rate) : "off");
const suggest = (id, values) => find(id).replaceChildren(...values.map((value) => el("option", { value })));
