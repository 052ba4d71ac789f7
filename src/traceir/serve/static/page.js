// The page: what happens when. Each part draws itself; here they are put together.

import { askJson, key, thumb } from "./api.js";
import { Composer } from "./composer.js";
import { announce, button, el, find, isTyping, onClick, openDialog, plural, say, toast } from "./dom.js";
import { conditionFor, conditionsOf, joined, rowsOf } from "./filters.js";
import {
  NOUNS, browses, clearHistory, drawHistory, fromHash, hitPicture, isEmpty, makeQuery, remember, samePicture, sayQuery, toHash, toPath,
} from "./query.js";
import { Column, Details, drawVerdict, nameOf } from "./results.js";
import { follow, newRun, nextPage } from "./run.js";

const WAIT_FOR_MODEL = 2000;
const EMPTY_HELP = "traceir index add FOLDER --index DIR";
const SHELF = 18; // pictures to start from
let config = {};
const turns = new Map(); // a turn is {id, query, parent, run, other}: each refinement has the turn before it as its parent
let trail = []; // the way to the current turn, and onwards
let current = null;
let parent = null; // the turn that the search box shows
let taken = null; // the id of the hit that "now make it ..." took from it
let columns = [];
let running = null; // {run, abort}
const composer = new Composer({ search, apply, stop });
const details = new Details({ refine, use, weigh, similar });
const actions = {
  open: openHit,
  refine,
  more,
  compare,
  retry: (run) => { start(run); find("stop").focus(); },
  unfiltered: () => composer.setWhere(""),
  anything: (query) => searchAnew(makeQuery({ ...query, modality: "" }), current.parent),
};

function search(query, { from = parentOf(query) } = {}) {
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
  if (current) begin(makeQuery({ ...current.query, ...composer.controls(), instruction: composer.query().instruction }), current.parent, "pushState");
  else if (composer.where || (composer.query().sort && browses(composer.query()))) search(composer.query());
}

function searchAnew(query, from = null) {
  composer.setQuery(query);
  search(query, { from });
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
  [current, parent, taken] = [turn, turn, null];
  if (way) history[way]({ turn: turn.id }, "", toHash(turn.query) ?? location.pathname + location.search);
  show(turn);
}

function visit(turn, way = null) {
  composer.setQuery(turn.query);
  enter(turn, way);
}

function step(by) {
  const next = trail[trail.indexOf(current) + by];
  if (next) choose(next);
}

function choose(turn) {
  visit(turn, "pushState");
  announce(`Turn ${trail.indexOf(turn) + 1} of ${trail.length}: ${sayQuery(turn.query)}`);
}

// A search goes on from the turn whose hit it took, or beside the turn whose picture it keeps; else it is new.
function parentOf({ picture }) {
  if (!parent || !picture) return null;
  if (picture.kind === "item" && picture.id === taken) return parent;
  if (samePicture(parent.query.picture, picture)) return parent.parent;
  const hits = [...parent.run.hits, ...(parent.other?.hits ?? [])];
  return picture.kind === "item" && hits.some((hit) => hit.id === picture.id) ? parent : null; // of a hit shown
}

async function start(run) {
  stop();
  const mine = { run, abort: new AbortController() };
  running = mine;
  composer.setBusy(true);
  announce("Searching.");
  try {
    await follow(run, mine.abort.signal, (what) => changed(run, what));
  } catch (error) {
    if (running === mine) askForKey(error.message, () => start(run));
  }
  if (running !== mine) return;
  running = null;
  composer.setBusy(false);
}

function stop() {
  running?.abort.abort();
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
  if (run.hits.length > had && columns.includes(column)) column.grid.cards[had].opener.focus();
}

function show(turn) {
  find("landing").hidden = true;
  find("workspace").hidden = false;
  document.title = `${sayQuery(turn.query).slice(0, 60)} · ${config.title || "TraceIR"}`;
  const runs = turn.other ? [turn.run, turn.other] : [turn.run];
  const names = turn.other ? ["The route taken", "The other route"] : ["Result"];
  columns = runs.map((run, side) => new Column(run, { config, name: names[side], actions }));
  find("columns").replaceChildren(...columns.map((column) => column.element));
  find("columns").classList.toggle("compare", columns.length > 1);
  drawTrail();
  update();
}

function drawTrail() {
  const [list, at] = [find("turns"), trail.indexOf(current)];
  find("trail").hidden = trail.length < 2;
  find("back").disabled = at <= 0;
  find("forth").disabled = at >= trail.length - 1;
  list.replaceChildren(...trail.map((turn, place) => el("li", {}, crumb(turn, place))));
  // Scrolls the trail alone, never the page.
  const shown = list.children[at];
  list.scrollLeft = shown.offsetLeft - list.offsetLeft - (list.clientWidth - shown.offsetWidth) / 2;
}

function crumb(turn, place) {
  const words = turn.query.text || turn.query.instruction || sayQuery(turn.query);
  const face = [el("span", { class: "unseen", text: `Turn ${place + 1}: ` }), thumb(turn.query.picture), el("span", { class: "crumb-words", dir: "auto", text: words })];
  return button(face, () => choose(turn), { class: "crumb", "aria-current": turn === current ? "step" : null, title: words });
}

function update() {
  const [mine, other] = columns;
  mine?.update({ other: other?.run ?? null, tells: !other });
  other?.update({ other: mine.run });
  if (other) drawVerdict(find("verdict"), mine.run, other.run, leaveComparison);
  else find("verdict").hidden = true;
}

function compare() {
  const turn = current;
  if (!turn || turn.other || turn.run.status !== "done" || !turn.run.route || config.reasons === false) return;
  turn.other = newRun(turn.query, turn.run, turn.run.route === "reason" ? "direct" : "reason");
  show(turn);
  start(turn.other);
  find("verdict").querySelector("button").focus();
}

function leaveComparison() {
  const turn = current;
  if (running?.run === turn.other) stop();
  turn.other = null;
  show(turn);
  columns[0].compare.focus();
}

function openHit(run, place) {
  const column = columns.find((shown) => shown.run === run);
  const closed = (last) => { if (!document.activeElement?.closest("#composer")) column.grid.cards[last]?.opener.focus(); };
  details.open(run.hits, place, { closed, weighs: !run.browses && run.query.mode !== "keyword" });
}

function refine(hit) {
  [parent, taken] = [current, hit.id];
  composer.refine(hit);
  scrollTo({ top: 0, behavior: matchMedia("(prefers-reduced-motion: reduce)").matches ? "auto" : "smooth" });
}

function use(hit) {
  searchAnew(makeQuery({ ...composer.query(), text: hit.text, picture: hit.image && hitPicture(hit), instruction: "" }), current);
}

// Away from a hit (-1), or towards it.
function weigh(hit, sign) {
  const term = { weight: sign * 0.5, ...(hit.image ? { id: hit.id, label: nameOf(hit) } : { text: hit.text.slice(0, 400) }) };
  composer.setTerms([...composer.terms.filter(({ id, text }) => (hit.image ? id !== hit.id : text !== term.text)), term]);
}

// What lies near a hit, without it.
async function similar(hit) {
  const asked = hit.image ? { image: { item: hit.id } } : { text: hit.text };
  const { hits } = await askJson("/search", { ...asked, route: "direct", k: 9, cutoff: 0 });
  return hits.filter(({ id }) => id !== hit.id);
}

function goHome() {
  stop();
  [parent, taken, current, columns] = [null, null, null, []];
  for (const [id, hidden] of [["workspace", true], ["trail", true], ["landing", false]]) find(id).hidden = hidden;
  document.title = config.title || "TraceIR";
  composer.setQuery(makeQuery({}));
  find("text").focus();
}

function drawLanding() {
  const code = (text) => el("code", { text });
  const counts = Object.entries(config.count ?? {}).filter(([, count]) => count > 0);
  say(find("collection"), counts.map(([modality, count]) => plural(count, NOUNS[modality] ?? modality)).join(" · ") || "nothing indexed yet");
  find("home").setAttribute("aria-label", `${config.title}, start page`);
  if (!counts.length) {
    showNotice("The collection is empty", el("p", {}, "Add a folder of pictures and texts with ", code(EMPTY_HELP), ", or post them to ",
      code("/items"), ". Then load this page again."));
  } else if (config.world && config.instead?.length) {
    showNotice("This model does not know your collection", el("div", {}, el("p", { dir: "auto", text: config.world }),
      el("p", { text: "Hits that mean something take a model that knows such things, for instance:" }),
      ...config.instead.map((command) => el("p", {}, code(command)))));
  } else if (config.world) {
    showNotice("What this model knows", config.world);
  } else {
    find("notice").hidden = true;
  }
  fill("examples", (config.examples ?? []).map(drawExample));
}

// What the collection suggests: its newest pictures, and values that many items share.
async function drawCollection() {
  const { facets } = await askJson("/v1/facets").catch(() => ({ facets: [] }));
  composer.setFacets(facets);
  find("facets").replaceChildren(...rowsOf(facets).map((facet) => el("div", {}, el("h3", { text: NAMES[facet.kind] ?? facet.name }),
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

const NAMES = { date: "Years", folder: "Folders" };

function narrow(facet, value) {
  if (composer.date && browses(composer.query())) find("sort").value = `-${composer.date}`;
  composer.setWhere(joined([...conditionsOf(composer.where), ...conditionsOf(conditionFor(facet, value))]));
}

// A list that is hidden with its heading while it is empty.
function fill(id, entries) {
  find(`${id}-part`).hidden = !entries.length;
  find(id).replaceChildren(...entries.map((entry) => el("li", {}, entry)));
}

function drawExample(example) {
  const words = el("span", {}, el("b", { dir: "auto", text: example.title }), el("span", { class: "asked", dir: "auto", text: example.text || example.instruction }));
  return button(words, () => searchAnew(makeQuery(example)), { class: "example" });
}

function showNotice(title, body, retry = null) {
  announce(title);
  find("notice").hidden = false;
  find("notice").replaceChildren(el("h2", { text: title }), typeof body === "string" ? el("p", { dir: "auto", text: body }) : body,
    ...(retry ? [button("Try again", retry, { class: "strong" })] : []));
}

function askForKey(why, then) {
  say(find("key-why"), why);
  find("key-value").value = "";
  find("forget-key").hidden = !key.get();
  // The form closes the dialog by itself.
  find("key-form").onsubmit = () => {
    key.set(find("key-value").value.trim());
    find("open-key").hidden = false;
    if (!config.count) loadConfig();
    then?.();
  };
  openDialog(find("key"));
}

onClick("forget-key", () => {
  key.set();
  find("open-key").hidden = true;
  toast("The key is forgotten.");
});

onClick("back", () => step(-1));
onClick("forth", () => step(1));
onClick("open-key", () => askForKey("A key is set for this tab.", null));
onClick("open-help", () => openDialog(find("help")));

onClick("open-history", () => {
  drawHistory(find("past"), (query) => {
    find("history").close();
    searchAnew(query);
  });
  openDialog(find("history"));
});

onClick("clear-history", () => {
  clearHistory();
  drawHistory(find("past"));
  announce("History cleared");
});

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

const KEYS = { "/": () => find("text").focus(), "f": () => composer.openPanel(true, true), "?": () => openDialog(find("help")), "c": compare, "[": () => step(-1), "]": () => step(1) };

addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing || document.querySelector("dialog[open]")) return;
  if (event.key === "Escape") {
    if (running) stop();
    else if (current?.other) leaveComparison();
  }
  if (isTyping(event.target) || !Object.hasOwn(KEYS, event.key)) return;
  event.preventDefault();
  KEYS[event.key]();
});

addEventListener("online", () => {
  const run = columns.at(-1)?.run;
  if (run?.status === "failed" && run.error.status === 0) start(run);
});

async function loadConfig() {
  try {
    config = await askJson("/page/config");
  } catch ({ status, message }) {
    if (status === 401) {
      askForKey(message, null);
      showNotice("A key is needed", message, () => askForKey(message, loadConfig));
    } else if (status === 503) {
      showNotice("The model is loading", "This page goes on as soon as the server is ready.");
      setTimeout(loadConfig, WAIT_FOR_MODEL);
    } else {
      showNotice("No connection", message, loadConfig);
    }
    return;
  }
  composer.setConfig(config);
  document.body.classList.toggle("one-pass", config.reasons === false);
  drawLanding();
  drawCollection();
  if (!find("landing").hidden) document.title = config.title || "TraceIR";
}

find("open-key").hidden = !key.get();
if (document.activeElement === document.body && matchMedia("(hover: hover)").matches) find("text").focus();
await loadConfig();
if (!current && fromHash(location.hash)) readAddress(); // unless somebody was faster
