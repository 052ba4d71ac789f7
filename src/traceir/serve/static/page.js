// The page: what happens when. Each part draws itself; here they are put together.

import { askJson, key } from "./api.js";
import { Column, drawVerdict, linkTwins } from "./column.js";
import { Composer } from "./composer.js";
import { announce, find, isTyping, onClick, openDialog, plural, say, toast } from "./dom.js";
import { drawLanding, showNotice } from "./landing.js";
import { EMPTY, clearHistory, drawHistory, fromHash, hitPicture, isEmpty, makeQuery, remember, samePicture, sayQuery, toHash } from "./query.js";
import { Details } from "./results.js";
import { follow, newRun, nextPage } from "./run.js";
import { Turns } from "./turns.js";

const WAIT_FOR_MODEL = 2000;
let config = {};
let parent = null; // the turn that the search box shows
let taken = null; // the id of the hit that "now make it ..." took from it
let columns = [];
let running = null; // {run, abort}
const composer = new Composer({ search, stop });
const turns = new Turns((turn) => {
  visit(turn, "pushState");
  announce(`Turn ${turns.trail.indexOf(turn) + 1} of ${turns.trail.length}: ${sayQuery(turn.query)}`);
});
const details = new Details({ refine, use });
const actions = { open: openHit, refine, retry, more, anything, compare };

// Searches

function search(query, { from = parentOf(query) } = {}) {
  if (isEmpty(query)) {
    composer.complain("Give a picture, words, or an instruction.");
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

function searchAnew(query, from = null) {
  composer.setQuery(query);
  search(query, { from });
}

// A new turn. `way` of the browser's history: "pushState" or "replaceState".
function begin(query, from, way) {
  const turn = turns.add(query, from, newRun(query, composer.cutoffFor(query)));
  enter(turn, way);
  start(turn.run);
}

// Shows a turn; without a `way` the browser's history is there already.
function enter(turn, way = null) {
  [parent, taken] = [turn, null];
  if (way) history[way]({ turn: turn.id }, "", toHash(turn.query) ?? location.pathname + location.search);
  show(turn);
}

function visit(turn, way = null) {
  turns.visit(turn);
  composer.setQuery(turn.query);
  enter(turn, way);
}

// A search goes on from the turn whose hit it took, or beside the turn whose picture it keeps; else it is new.
function parentOf({ picture }) {
  if (!parent || !picture) return null;
  if (picture.kind === "item" && picture.id === taken) return parent;
  if (samePicture(parent.query.picture, picture)) return parent.parent;
  const hits = [...parent.run.hits, ...(parent.other?.hits ?? [])];
  return picture.kind === "item" && hits.some((hit) => hit.id === picture.id) ? parent : null; // dragged
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
  const how = run.route === "reason" ? "with reasoning" : "without reasoning";
  announce(`${plural(run.hits.length, "hit")} ${how}. The first: ${(first.text ?? first.id).slice(0, 200)}`);
}

function retry(run) {
  start(run);
  find("stop").focus();
}

function anything(query) {
  searchAnew(makeQuery({ ...query, modality: "" }), turns.current.parent);
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
  if (run.hits.length > had && columns.includes(column)) column.grid.focus(had);
}

// What is shown

function show(turn) {
  find("landing").hidden = true;
  find("workspace").hidden = false;
  document.title = `${sayQuery(turn.query).slice(0, 60)} · ${config.title || "TraceIR"}`;
  const runs = turn.other ? [turn.run, turn.other] : [turn.run];
  const names = turn.other ? ["The route taken", "The other route"] : ["Result"];
  columns = runs.map((run, side) => new Column(run, { config, name: names[side], actions }));
  find("columns").replaceChildren(...columns.map((column) => column.element));
  find("columns").classList.toggle("compare", columns.length > 1);
  turns.draw();
  update();
}

function update() {
  const [mine, other] = columns;
  mine?.update({ other: other?.run ?? null, tells: !other });
  other?.update({ other: mine.run });
  if (other) drawVerdict(find("verdict"), mine.run, other.run, leaveComparison);
  else find("verdict").hidden = true;
}

function compare() {
  const turn = turns.current;
  if (!turn || turn.other || turn.run.status !== "done" || config.reasons === false) return;
  turn.other = newRun(turn.query, turn.run.cutoff, turn.run.route === "reason" ? "direct" : "reason");
  show(turn);
  start(turn.other);
  find("verdict").querySelector("button").focus();
}

function leaveComparison() {
  const turn = turns.current;
  if (running?.run === turn.other) stop();
  turn.other = null;
  show(turn);
  columns[0].compare.focus();
}

function openHit(run, place) {
  const column = columns.find((shown) => shown.run === run);
  details.open(run.hits, place, (last) => { if (!document.activeElement?.closest("#composer")) column.grid.focus(last); });
}

function refine(hit) {
  [parent, taken] = [turns.current, hit.id];
  composer.refine(hit);
  scrollTo({ top: 0, behavior: matchMedia("(prefers-reduced-motion: reduce)").matches ? "auto" : "smooth" });
}

// A hit as the whole query.
function use(hit) {
  searchAnew(makeQuery({ ...composer.query(), text: hit.text, picture: hit.image && hitPicture(hit), instruction: "" }), turns.current);
}

function goHome() {
  stop();
  [parent, taken, turns.current, columns] = [null, null, null, []];
  for (const [id, hidden] of [["workspace", true], ["trail", true], ["landing", false]]) find(id).hidden = hidden;
  document.title = config.title || "TraceIR";
  composer.setQuery(EMPTY);
  find("text").focus();
}

// Key, history, addresses

let answerKey = null;

function askForKey(why, then) {
  say(find("key-why"), why);
  find("key-value").value = "";
  find("forget-key").hidden = !key.get();
  answerKey = then;
  openDialog(find("key"));
}

// The form closes the dialog by itself.
find("key-form").addEventListener("submit", () => {
  key.set(find("key-value").value.trim());
  find("open-key").hidden = false;
  if (!config.count) loadConfig();
  answerKey?.();
});

onClick("forget-key", () => {
  key.forget();
  find("open-key").hidden = true;
  toast("The key is forgotten.");
});

onClick("open-key", () => askForKey("A key is set for this tab.", null));
onClick("open-help", () => openDialog(find("help")));

onClick("open-history", () => {
  drawHistory(find("past"), (query, leftOut) => {
    find("history").close();
    if (!leftOut) return searchAnew(query);
    composer.setQuery(query);
    return composer.complain(`The picture “${leftOut}” was too large to keep. Add it again, then search.`);
  });
  openDialog(find("history"));
});

onClick("clear-history", () => {
  clearHistory();
  drawHistory(find("past"));
  announce("History cleared");
});

onClick("home", (event) => {
  if (event.ctrlKey || event.metaKey || event.shiftKey || event.button) return;
  event.preventDefault();
  history.pushState({}, "", location.pathname + location.search);
  goHome();
});

// The browser's own back and forward.
addEventListener("popstate", (event) => {
  const known = turns.all.get(event.state?.turn);
  if (known) visit(known);
  else readAddress();
});

function readAddress() {
  const query = fromHash(location.hash);
  if (!query) return goHome();
  composer.setQuery(query);
  return begin(query, null, "replaceState");
}

const KEYS = { "/": () => find("text").focus(), "?": () => openDialog(find("help")), "c": compare, "[": () => turns.step(-1), "]": () => turns.step(1) };

addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing || document.querySelector("dialog[open]")) return;
  if (event.key === "Escape") {
    if (running) stop();
    else if (turns.current?.other) leaveComparison();
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
  composer.setInstructions(config.instructions ?? []);
  composer.setCutoff(config.cutoff);
  document.body.classList.toggle("one-pass", config.reasons === false);
  drawLanding(config, (query) => searchAnew(query), refine);
  if (!find("landing").hidden) document.title = config.title || "TraceIR";
}

linkTwins(find("columns"));
find("open-key").hidden = !key.get();
if (document.activeElement === document.body && matchMedia("(hover: hover)").matches) find("text").focus();
await loadConfig();
if (!turns.current && fromHash(location.hash)) readAddress(); // unless somebody was faster
