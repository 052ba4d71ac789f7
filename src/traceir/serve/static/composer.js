// The search box: a picture by drop, paste or choice, words, instruction, modality, route; and what narrows, orders and weighs.

import { askJson, showQueryPicture } from "./api.js";
import { announce, button, el, find, icon, onClick, say, sayRate, toast } from "./dom.js";
import { conditionsOf, joined, rangeOf, suggestionsFor, withRange } from "./filters.js";
import { browses, filePicture, hitPicture, kindOf, makeQuery } from "./query.js";

const RATES = [0, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005, 0.002, 0.001]; // of the cut-off; 0 is none
const WEIGHTS = [0.25, 0.5, 1, 2]; // of a term
const PLAIN = "Describe what you look for, or add a picture";
const CHANGE = "now make it …";

export class Composer {
  picture = null;
  reading = 0; // counts what became of the picture, so that a file that is read late does not take its place
  config = {};
  rates = [0];
  ready = new Promise((resolve) => { this.isReady = resolve; }); // that the server has said what it takes
  facets = [];
  where = ""; // the filter as it was applied; a wrong one stays in its field
  terms = [];
  ownRate = 0;
  form = find("composer");
  text = find("text");
  instruction = find("instruction");

  // actions: {search(query), apply(): a control was changed, stop()}
  constructor({ search, apply, stop }) {
    this.apply = apply;
    this.form.addEventListener("submit", (event) => {
      event.preventDefault();
      search(this.query());
    });
    this.form.addEventListener("input", ({ target }) => {
      this.complain("");
      if (target.type !== "date") this.refresh(); // it would take back what is being picked
    });
    this.text.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      this.form.requestSubmit();
    });
    onClick("stop", stop);
    this.watchControls();
    find("file").addEventListener("change", (event) => {
      this.takeFiles([...event.target.files]);
      event.target.value = "";
    });
    onClick("remove", () => { this.setPicture(null); find("file").focus(); });
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
      if (event.dataTransfer?.types.includes("Files")) act(event);
    });
    when("dragenter", () => show(true));
    when("dragleave", (event) => { if (event.target === find("drop")) show(false); });
    when("dragover", (event) => event.preventDefault());
    when("drop", (event) => {
      event.preventDefault();
      show(false);
      this.takeFiles([...event.dataTransfer.files]);
      this.text.focus();
    });
  }

  watchControls() {
    onClick("open-panel", () => this.openPanel(find("panel").hidden));
    this.form.addEventListener("change", ({ target }) => {
      if (target.type === "radio" || ["sort", "fold", "cutoff"].includes(target.id)) this.applied();
      else if (target.id === "where") this.setWhere(target.value);
      else if (target.type === "date") {
        const where = find("where").ariaInvalid ? this.where : find("where").value; // which may be on its way still
        this.setWhere(joined(withRange(conditionsOf(where), this.date, [find("from").value, find("to").value])));
      }
    });
    find("cutoff").addEventListener("input", () => this.sayCutoff());
    find("where").addEventListener("input", ({ target }) => {
      find("filters").replaceChildren(...suggestionsFor(target.value, this.facets).map((value) => el("option", { value })));
    });
    const add = (sign) => () => {
      const text = find("term").value.trim();
      find("term").value = "";
      if (text) this.setTerms([...this.terms.filter((term) => term.text !== text), { weight: sign * 0.5, text }]);
    };
    onClick("more-of", add(1));
    onClick("less-of", add(-1));
    for (const [id, act] of [["where", () => this.setWhere(find("where").value)], ["term", add(1)]]) {
      find(id).addEventListener("keydown", (event) => {
        if (event.key !== "Enter" || event.isComposing) return;
        event.preventDefault();
        act();
      });
    }
  }

  openPanel(open, focuses = false) {
    find("panel").hidden = !open;
    find("open-panel").ariaExpanded = String(open);
    if (focuses) find("where").focus();
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
    const field = find("where");
    if (message) this.openPanel(true);
    field.ariaInvalid = message ? "true" : null;
    find("where-error").hidden = !message;
    say(find("where-error"), message.replace(/^where: /, ""));
  }

  setTerms(terms) { this.terms = terms; this.applied(); }

  // The first picture among files that came together, sent as it is: what is searched with must be what was given.
  async takeFiles(files) {
    await this.ready;
    const { types = {}, suffixes = [], most_bytes: most = Infinity } = this.config.pictures ?? {};
    const isKnown = ({ type, name }) => type in types || suffixes.some((suffix) => name.toLowerCase().endsWith(suffix));
    const file = files.find(isKnown);
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
    const had = this.picture !== null;
    this.picture = picture;
    find("choose").hidden = picture !== null;
    find("chosen").hidden = picture === null;
    this.complain("");
    this.refresh();
    const lost = find("preview-lost");
    lost.hidden = true;
    const fresh = el("img", { id: "preview", alt: "the picture to search with", on: { error: () => { lost.hidden = false; } } });
    find("preview").replaceWith(fresh);
    if (picture) showQueryPicture(fresh, picture);
    const name = picture && (picture.kind === "item" ? picture.label || picture.id : picture.name);
    find("about-picture").hidden = picture === null;
    say(find("about-picture"), picture ? `with ${name}` : "");
    if (picture || had) announce(picture ? `Picture added: ${name}` : "Picture removed");
  }

  query() {
    return makeQuery({ ...this.controls(), text: this.text.value, picture: this.picture, instruction: this.instruction.value });
  }

  // All but what is asked.
  controls() {
    const { modality, mode, route, sort, fold, cutoff } = this.form.elements;
    const rate = this.rates[cutoff.valueAsNumber];
    return {
      modality: modality.value, mode: mode.value, route: route.value, sort: sort.value, where: this.where, terms: this.terms,
      fold: fold.checked === Boolean(this.config.fold) ? null : fold.checked,
      cutoff: cutoff.disabled || rate === this.ownRate ? null : rate,
    };
  }

  setQuery(query) {
    this.text.value = query.text;
    this.instruction.value = query.instruction;
    // One by one: the `value` of a radio group does not take "".
    for (const radio of this.form.querySelectorAll("input[type=radio]")) radio.checked = radio.value === query[radio.name];
    this.setSort(query.sort);
    [this.where, this.terms] = [query.where, query.terms];
    find("where").value = query.where;
    this.blame("");
    this.setDecisions(query);
    this.setPicture(query.picture);
  }

  setSort(value) {
    const sort = find("sort");
    sort.length = 4;
    if (![...sort.options].some((option) => option.value === value)) sort.append(el("option", { value, text: value }));
    sort.value = value;
  }

  // Ready for "now make it ..." of a hit: its picture, no words.
  refine(hit) {
    this.text.value = "";
    this.setPicture(hitPicture(hit));
    this.text.focus();
    announce("This picture is the next query's. Say what to change.");
  }

  // What follows from the fields: placeholder, chips, dates.
  refresh() {
    this.text.placeholder = this.picture ? CHANGE : PLAIN;
    const conditions = conditionsOf(this.where);
    [find("from").value, find("to").value] = this.date ? rangeOf(conditions, this.date) : ["", ""];
    const { route, cutoff, instruction } = this.query();
    const chips = conditions.map((one, place) => this.chip(one, () => this.setWhere(joined(conditions.toSpliced(place, 1)))));
    chips.push(...this.terms.map((term) => this.termChip(term)));
    const reset = (id, value) => () => { find(id).value = value; this.applied(); };
    if (instruction) chips.push(this.chip(instruction, reset("instruction", "")));
    if (route !== "auto") chips.push(this.chip(`route: ${route}`, () => { this.form.elements.route.value = "auto"; this.applied(); }));
    if (cutoff !== null) chips.push(this.chip(`cut-off: ${cutoff ? sayRate(cutoff) : "off"}`, reset("cutoff", this.rates.indexOf(this.ownRate))));
    find("on").hidden = !chips.length;
    find("on").replaceChildren(...chips);
    this.sayCutoff();
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
    const turn = button(term.weight > 0 ? "+" : "−", () => change(-term.weight), { class: "round sign", "aria-label": `${term.weight > 0 ? "More" : "Less"} of ${name}; turn round` });
    const chip = this.chip(name, () => this.setTerms(this.terms.filter((other) => other !== term)), weights);
    chip.prepend(turn);
    chip.classList.toggle("less", term.weight < 0);
    return chip;
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

  // `facets`: of the collection. Without dates there is nothing to pick or sort by.
  setFacets(facets) {
    this.facets = facets;
    const dates = facets.filter(({ kind }) => kind === "date").map(({ name }) => name);
    this.date = dates.includes("date") ? "date" : dates[0];
    find("dates").hidden = !this.date;
    const chosen = find("sort").value;
    const values = ["", `-${this.date ?? "date"}`, this.date ?? "date", facets.some(({ name }) => name === "name") ? "name" : "id"];
    values.forEach((value, place) => { find("sort").options[place].value = value; });
    for (const place of [1, 2]) find("sort").options[place].hidden = !this.date;
    this.setSort(chosen);
    this.refresh();
  }

  // How often a query whose answer is not here may be shown hits all the same (a rate, 0 for no cut-off, null where the server decides
  // because it cannot tell for this kind of query, or words alone rank), and whether hits are folded.
  decisionsFor(query) {
    const judges = kindOf(query) in (this.config.cutoff?.background ?? {}) && query.mode !== "keyword" && !browses(query);
    const cutoff = judges ? query.cutoff ?? this.ownRate : null;
    return { cutoff, fold: query.fold ?? Boolean(this.config.fold) };
  }

  setConfig(config) {
    this.config = config;
    this.isReady();
    const { types = {}, suffixes = [] } = config.pictures ?? {};
    find("file").accept = [...Object.keys(types), ...suffixes].join(",") || "image/*";
    find("instructions").replaceChildren(...(config.instructions ?? []).map((value) => el("option", { value })));
    // Rates that the background cannot tell are not offered; without a background nothing is.
    const most = Math.max(0, ...Object.values(config.cutoff?.background ?? {}));
    this.ownRate = config.cutoff?.default ?? 0;
    this.rates = [...new Set([...RATES.filter((rate) => !rate || rate * (most + 1) >= 1), this.ownRate])].sort((first, second) => (second || 1) - (first || 1));
    Object.assign(find("cutoff"), { max: this.rates.length - 1, disabled: most === 0 });
    find("cutoff-why").hidden = most > 0;
    find("cutoff-says").hidden = most === 0;
    this.setDecisions({ fold: null, cutoff: null });
    this.refresh();
  }

  setDecisions({ fold, cutoff }) {
    find("fold").checked = fold ?? Boolean(this.config.fold);
    const away = (rate) => Math.abs(rate - (cutoff ?? this.ownRate));
    find("cutoff").value = this.rates.reduce((best, rate, place) => (away(rate) < away(this.rates[best]) ? place : best), 0);
  }

  sayCutoff() {
    const rate = this.rates[find("cutoff").valueAsNumber];
    find("cutoff-says").value = rate ? sayRate(rate) : "off";
    find("cutoff").setAttribute("aria-valuetext", rate ? `${sayRate(rate)} false alarms` : "off");
  }
}
