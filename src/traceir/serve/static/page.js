// The page: what happens when. Each part draws itself; here they are put together.

import { askJson, key, thumb } from "./api.js";
import { Composer } from "./composer.js";
import { announce, button, el, find, isTyping, onClick, openDialog, plural, say, toast } from "./dom.js";
import { conditionFor, conditionsOf, joined, rowsOf } from "./filters.js";
import { NOUNS, browses, fromHash, hitPicture, isEmpty, makeQuery, remember, samePicture, sayQuery, toHash, toPath, watchHistory } from "./query.js";
import { Column, Details, drawVerdict, nameOf } from "./results.js";
import { follow, newRun, nextPage } from "./run.js";

const WAIT_FOR_MODEL = 2000;
const SHELF = 18; // pictures to start from
const UNKNOWN = { title: "TraceIR", count: {}, examples: [], instead: [], instructions: [], pictures: { types: {}, suffixes: [] }, cutoff: { background: {} } };
let config = UNKNOWN; // as /page/config says
const turns = new Map(); // a turn is {id, query, parent, run, other}: each refinement has the turn before it as its parent
let trail = []; // the way to the current turn, and onwards
let current = null;
let taken = null; // the id of the hit that "now make it ..." took from it
let columns = [];
let running = null; // {run, abort}
const stop = () => running?.abort.abort();
const composer = new Composer({ search, apply, stop });
const details = new Details({ refine, use, weigh });
const actions = {
  open, refine, more, compare,
  retry: (run) => { start(run); find("stop").focus(); },
  unfiltered: () => composer.setWhere(""),
  anything: (query) => searchAnew(makeQuery({ ...query, modality: "" }), current.parent),
};

function search(query, from = parentOf(query)) {
  if (isEmpty(query)) {
    composer.complain("Give a picture, words, or a filter.");
    find("text").focus();
    return;
  }
  begin(query, from, "pushState");
  remember(query);
  // On a narrow screen the answer is below the search box, and a keyboard on the screen would lie over it.
  if (!matchMedia("(max-width: 46rem)").matches) return;
  if (matchMedia("(pointer: coarse)").matches) find("text").blur();
  find("workspace").scrollIntoView({ block: "start" });
}

// A control was changed: what is shown is asked anew beside the current turn, and a filter alone is something to show.
function apply() {
  const query = composer.query();
  if (current) begin(makeQuery({ ...current.query, ...composer.controls() }), current.parent, "pushState");
  else if (query.where || (query.sort && browses(query))) search(query);
}

function searchAnew(query, from = null) {
  composer.setQuery(query);
  search(query, from);
}

// A new turn behind `from` (null: a new search); what lay ahead of that leaves the trail. `way` of the browser's history: "pushState" or
// "replaceState". Its entries outlive this page, so ids must not come again after a reload.
function begin(query, from, way) {
  const id = `${performance.timeOrigin}-${turns.size}`;
  turns.set(id, { id, query, parent: from, run: newRun(query, composer.decisionsFor(query)), other: null });
  enter(turns.get(id), way);
  start(current.run);
}

// Makes a turn the current one; the trail stays if it is on it. Without a `way` the browser's history is there already.
function enter(turn, way = null) {
  if (!trail.includes(turn)) {
    trail = [];
    for (let at = turn; at; at = at.parent) trail.unshift(at);
  }
  [current, taken] = [turn, null];
  if (way) history[way]({ turn: turn.id }, "", toHash(turn.query) ?? location.pathname + location.search);
  show(turn);
}

function visit(turn, way = null) {
  composer.setQuery(turn.query);
  enter(turn, way);
}

const step = (by) => choose(trail[trail.indexOf(current) + by]);

function choose(turn) {
  if (!turn) return;
  visit(turn, "pushState");
  announce(`Turn ${trail.indexOf(turn) + 1} of ${trail.length}: ${sayQuery(turn.query)}`);
}

// A search goes on from the turn whose hit it took, or beside the turn whose picture it keeps; else it is new.
function parentOf({ picture }) {
  if (!current || !picture) return null;
  const isHit = (id) => picture.kind === "item" && picture.id === id;
  if (!isHit(taken) && samePicture(current.query.picture, picture)) return current.parent;
  return isHit(taken) || columns.some(({ run }) => run.hits.some(({ id }) => isHit(id))) ? current : null;
}

async function start(run) {
  stop();
  const mine = running = { run, abort: new AbortController() };
  composer.setBusy(true);
  announce("Searching.");
  await follow(run, mine.abort.signal, (what) => changed(run, what));
  if (running !== mine) return;
  running = null;
  composer.setBusy(false);
  if (run.error?.status === 401) askForKey(run.error.message, () => start(run));
}

function changed(run, what) {
  if (!columns.some((column) => column.run === run)) return;
  update();
  const [first] = run.hits;
  if (what !== "hits" || !first) return;
  const how = { reason: " with reasoning", direct: " without reasoning" }[run.route] ?? "";
  announce(`${plural(run.hits.length, "hit")}${how}. The first: ${(first.text ?? nameOf(first)).slice(0, 200)}`);
}

async function more(column) {
  const { run } = column;
  const had = run.hits.length;
  run.paging = true;
  update();
  try {
    announce(plural(await nextPage(run), "more hit"));
  } catch (error) {
    if (error.status === 401) askForKey(error.message, () => more(column));
    else toast(error.message);
  }
  run.paging = false;
  update();
  if (run.hits.length > had && columns.includes(column)) column.cards[had].opener.focus();
}

// Either the start page or a search.
function showPart(starts, title = "") {
  find("landing").hidden = !starts;
  find("workspace").hidden = starts;
  document.title = title + (config.title || "TraceIR");
}

function show(turn) {
  showPart(false, `${sayQuery(turn.query).slice(0, 60)} · `);
  const runs = turn.other ? [turn.run, turn.other] : [turn.run];
  const names = turn.other ? ["The route taken", "The other route"] : ["Result"];
  columns = runs.map((run, side) => new Column(run, { config, name: names[side], actions }));
  find("columns").replaceChildren(...columns.map((column) => column.element));
  find("columns").classList.toggle("compare", columns.length > 1);
  drawTrail();
  update();
}

function drawTrail() {
  const list = find("turns");
  const at = trail.indexOf(current);
  find("trail").hidden = trail.length < 2;
  find("back").disabled = at <= 0;
  find("forth").disabled = at >= trail.length - 1;
  list.replaceChildren(...trail.map((turn, place) => {
    const words = turn.query.text || turn.query.instruction || sayQuery(turn.query);
    const face = [el("span", { class: "unseen", text: `Turn ${place + 1}: ` }), thumb(turn.query.picture), el("span", { class: "crumb-words", dir: "auto", text: words })];
    return el("li", {}, button(face, () => choose(turn), { class: "crumb", "aria-current": turn === current ? "step" : null, title: words }));
  }));
  // Scrolls the trail alone, never the page.
  const shown = list.children[at];
  list.scrollLeft = shown.offsetLeft - list.offsetLeft - (list.clientWidth - shown.offsetWidth) / 2;
}

function update() {
  const [mine, other] = columns;
  mine?.update({ other: other?.run ?? null, tells: !other });
  other?.update({ other: mine.run });
  find("verdict").hidden = !other;
  if (other) drawVerdict(mine.run, other.run);
}

function compare() {
  const turn = current;
  if (!turn || turn.other || turn.run.status !== "done" || !turn.run.route || config.reasons === false) return;
  turn.other = newRun(turn.query, turn.run, turn.run.route === "reason" ? "direct" : "reason");
  show(turn);
  start(turn.other);
  find("leave").focus();
}

function leaveComparison() {
  const turn = current;
  if (running?.run === turn.other) stop();
  turn.other = null;
  show(turn);
  columns[0].compare.focus();
}

function open(run, place) {
  const column = columns.find((shown) => shown.run === run);
  const closed = (last) => { if (!document.activeElement?.closest("#composer")) column.cards[last]?.opener.focus(); };
  details.open(run.hits, place, { closed, weighs: !run.browses && run.query.mode !== "keyword" });
}

// Ready for "now make it ..." of a hit: its picture, no words.
function refine(hit) {
  taken = hit.id;
  find("text").value = "";
  composer.setPicture(hitPicture(hit));
  find("text").focus();
  announce("This picture is the next query's. Say what to change.");
  scrollTo({ top: 0, behavior: matchMedia("(prefers-reduced-motion: reduce)").matches ? "auto" : "smooth" });
}

function use(hit) {
  searchAnew(makeQuery({ ...composer.query(), text: hit.text, picture: hit.image && hitPicture(hit), instruction: "" }), current);
}

// Away from a hit (-1), or towards it.
function weigh(hit, sign) {
  composer.addTerm(sign, hit.image ? { id: hit.id, label: nameOf(hit) } : { text: hit.text.slice(0, 400) });
}

function goHome() {
  stop();
  [taken, current, columns] = [null, null, []];
  showPart(true);
  find("trail").hidden = true;
  composer.setQuery(makeQuery({}));
  find("text").focus();
}

function drawLanding() {
  const code = (text) => el("code", { text });
  const counts = Object.entries(config.count).filter(([, count]) => count > 0);
  say(find("collection"), counts.map(([modality, count]) => plural(count, NOUNS[modality] ?? modality)).join(" · ") || "nothing indexed yet");
  find("home").setAttribute("aria-label", `${config.title}, start page`);
  find("notice").hidden = true;
  if (!counts.length) {
    showNotice("The collection is empty", el("p", {}, "Add a folder of pictures and texts with ", code("traceir index add FOLDER --index DIR"),
      ", or post them to ", code("/items"), ". Then load this page again."));
  } else if (config.world) {
    const commands = config.instead.map((command) => el("p", {}, code(command)));
    if (commands.length) commands.unshift("Hits that mean something take a model that knows such things, for instance:");
    showNotice(commands.length ? "This model does not know your collection" : "What this model knows", config.world, ...commands);
  }
  fill("examples", config.examples.map((example) => {
    const asked = el("span", { class: "asked", dir: "auto", text: example.text || example.instruction });
    return button(el("span", {}, el("b", { dir: "auto", text: example.title }), asked), () => searchAnew(makeQuery(example)), { class: "example" });
  }));
}

// What the collection suggests: its newest pictures, and values that many items share.
async function drawCollection() {
  const { facets } = await askJson("/v1/facets").catch(() => ({ facets: [] }));
  composer.setFacets(facets);
  find("facets").replaceChildren(...rowsOf(facets).map((facet) => el("div", {}, el("h3", { text: { date: "Years", folder: "Folders" }[facet.kind] ?? facet.name }),
    el("ul", { class: "chips", role: "list" }, ...facet.values.slice(0, 8).map(([value, count]) => el("li", {},
      button([`${value} `, el("span", { class: "number", text: count.toLocaleString("en") })], () => narrow(facet, value), { class: "chip" })))))));
  const sort = composer.date ? `-${composer.date}` : "";
  const { items = [] } = await askJson(toPath({ where: "", sort, modality: "" }, { limit: sort ? 4 * SHELF : 300 })).catch(() => ({}));
  say(find("shelf-title"), sort ? "Newest" : "From this collection");
  const pictures = items.filter(({ image }) => image);
  const step = sort ? 1 : Math.max(1, Math.floor(pictures.length / SHELF)); // without dates from all over what was read
  fill("shelf", pictures.filter((_, place) => place % step === 0).slice(0, SHELF).map((item) =>
    button([thumb(hitPicture(item), item.text?.slice(0, 200) || `picture ${nameOf(item)}`)], () => refine(item), { title: item.id })));
}

function narrow(facet, value) {
  if (composer.date && browses(composer.query())) find("sort").value = `-${composer.date}`;
  composer.setWhere(joined([...conditionsOf(composer.where), ...conditionsOf(conditionFor(facet, value))]));
}

// A list that is hidden with its heading while it is empty.
function fill(id, entries) {
  find(`${id}-part`).hidden = !entries.length;
  find(id).replaceChildren(...entries.map((entry) => el("li", {}, entry)));
}

function showNotice(title, ...parts) {
  announce(title);
  find("notice").hidden = false;
  find("notice").replaceChildren(el("h2", { text: title }),
    ...parts.map((part) => (typeof part === "string" ? el("p", { dir: "auto", text: part }) : part)));
}

const again = (retry) => button("Try again", retry, { class: "strong" });

function askForKey(why, then) {
  say(find("key-why"), why);
  find("key-value").value = "";
  find("forget-key").hidden = !key.get();
  // The form closes the dialog by itself.
  find("key-form").onsubmit = () => {
    key.set(find("key-value").value.trim());
    find("open-key").hidden = false;
    if (config === UNKNOWN) loadConfig();
    then?.();
  };
  openDialog(find("key"));
}

onClick("forget-key", () => {
  key.set();
  find("open-key").hidden = true;
  toast("The key is forgotten.");
});
onClick("leave", leaveComparison);
onClick("open-key", () => askForKey("A key is set for this tab."));
watchHistory(searchAnew);

addEventListener("popstate", (event) => {
  const known = turns.get(event.state?.turn);
  if (known) visit(known);
  else readAddress();
});

function readAddress() {
  const query = fromHash(location.hash);
  if (!query) return goHome();
  composer.setQuery(query);
  return begin(query, null, "replaceState");
}

const KEYS = {
  "/": () => find("text").focus(), "f": () => { composer.openPanel(true); find("where").focus(); },
  "?": () => openDialog(find("help")), "c": compare, "[": () => step(-1), "]": () => step(1),
};
for (const pressed of document.querySelectorAll("[data-key]")) pressed.addEventListener("click", KEYS[pressed.dataset.key]);

addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing || document.querySelector("dialog[open]")) return;
  if (event.key === "Escape" && running) stop();
  else if (event.key === "Escape" && current?.other) leaveComparison();
  if (isTyping(event.target) || !Object.hasOwn(KEYS, event.key)) return;
  event.preventDefault();
  KEYS[event.key]();
});

addEventListener("online", () => {
  const run = columns.at(-1)?.run;
  if (run?.error?.status === 0) start(run);
});

async function loadConfig() {
  try {
    config = { ...UNKNOWN, ...await askJson("/page/config") };
  } catch ({ status, message }) {
    if (status === 401) {
      askForKey(message);
      return showNotice("A key is needed", message, again(() => askForKey(message)));
    }
    if (status !== 503) return showNotice("No connection", message, again(loadConfig));
    setTimeout(loadConfig, WAIT_FOR_MODEL);
    return showNotice("The model is loading", "This page goes on as soon as the server is ready.");
  }
  composer.setConfig(config);
  document.body.classList.toggle("one-pass", config.reasons === false);
  drawLanding();
  drawCollection();
  if (!current) showPart(true);
  return null;
}

find("open-key").hidden = !key.get();
if (document.activeElement === document.body && matchMedia("(hover: hover)").matches) find("text").focus();
await loadConfig();
if (!current && fromHash(location.hash)) readAddress(); // unless somebody was faster
