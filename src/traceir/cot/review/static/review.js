// The review page: one sample at a time; a decision counts once the server has answered. Text from data is only ever textContent.

import { ApiError, askJson } from "./api.js";
import { announce, button, el, find, onClick, openDialog, say } from "./dom.js";

const WORDS = { k: "kept", d: "dropped", e: "edited", ".": "undecided" };
const LOST = "The server does not answer: nothing was saved. Start it again; what was saved before is safe.";

const state = {
  reviewer: "",
  marks: [], // one of k d e . for each sample
  strata: [],
  reasons: [],
  number: 0,
  sample: null,
  target: 0,
  mode: "look", // look, why, edit
  busy: 0, // actions that run or wait
  last: Promise.resolve(),
  ahead: new Map(), // the sample after this one, already asked for
};

/** Runs one action and tells what goes wrong. While one runs, steps wait their turn and decisions, which would fall on a sample
 * that nobody has seen, are not taken. */
function act(action, waits = false) {
  if (state.busy && !waits) return;
  state.busy += 1;
  state.last = state.last.then(() => attempt(action));
}

async function attempt(action) {
  try {
    tell("");
    await action();
  } catch (error) {
    const isRefusal = error instanceof ApiError;
    tell(isRefusal ? error.message : `The page is at fault: ${error}`);
    if (isRefusal && !error.status) tell(LOST);
    if (!isRefusal) reportError(error);
  } finally {
    state.busy -= 1;
  }
}

function tell(problem) {
  find("alert").textContent = problem;
  find("alert").hidden = !problem;
}

const askReview = (reviewer) => askJson(`/api/review?reviewer=${encodeURIComponent(reviewer)}`);
const askSample = (number) => askJson(`/api/sample/${number}?reviewer=${encodeURIComponent(state.reviewer)}`);

function put(id, text, absent = "") {
  say(find(id), String(text || absent));
  find(id).classList.toggle("absent", !text);
}

function putPicture(name, address) {
  const img = () => el("img", { id: `${name}-picture`, src: address, alt: `Picture of the ${name}` });
  find(`${name}-frame`).replaceChildren(address ? el("a", { href: address, target: "_blank", rel: "noopener" }, img()) : "");
}

async function show(number) {
  const known = state.ahead.get(number);
  state.ahead.clear();
  const sample = await (known || askSample(number));
  Object.assign(state, { number, sample, target: 0 });
  setMode("look");
  render();
  const address = new URL(location.href);
  address.searchParams.set("reviewer", state.reviewer);
  address.searchParams.set("n", String(number + 1));
  history.replaceState(null, "", address);
  window.scrollTo(0, 0);
  lookAhead();
}

function lookAhead() {
  const next = after(state.number);
  if (next < 0) return;
  const asked = askSample(next);
  asked.then((sample) => {
    for (const address of [sample.query.picture, sample.targets[0]?.picture]) if (address) new Image().src = address;
  }).catch(() => state.ahead.delete(next));
  state.ahead.set(next, asked);
}

function render() {
  const { sample, number } = state;
  find("at").value = number + 1;
  find("status").dataset.fate = sample.status;
  put("fate", fate(sample));
  put("detail", sample.detail || sample.verdict_reason);
  for (const name of ["task", "qid", "instruction", "provenance"]) put(name, sample[name]);
  put("how", sample.how === "doubt" ? "drawn by doubt" : "drawn at random");
  put("query-text", sample.query.text);
  putPicture("query", sample.query.picture);
  put("raw", sample.raw, "There was no reply.");
  put("assessment", sample.z ? `Complex, ${sample.confidence.toFixed(2)} sure. ${sample.assessment}` : sample.assessment);
  renderTarget();
  renderWritten();
  renderProgress();
}

function fate({ status, rule, verdict, verdict_confidence: sure }) {
  const says = verdict === null ? "the verifier was not asked" : `the verifier says ${verdict ? "yes" : "no"}, ${sure.toFixed(2)} sure`;
  if (status !== "dropped") return `Kept by the filter; ${says}.`;
  if (rule === "verifier") return `Dropped by the verifier; ${says}.`;
  return rule === "teacher" ? "Dropped: the teacher gave nothing that can be read." : `Dropped by the rule “${rule}”.`;
}

function renderTarget() {
  const { targets } = state.sample;
  const target = targets[state.target];
  find("targets").hidden = targets.length < 2;
  put("target-place", `${state.target + 1} of ${targets.length}`);
  put("target-did", target?.did, "The target is not in the pool.");
  put("target-text", target?.text);
  putPicture("target", target?.picture);
}

/** What the teacher wrote, or what the reviewer made of it. */
const written = ({ mine, ...sample }) => (mine?.decision === "edit" ? mine : sample);

function renderWritten() {
  const { mine } = state.sample;
  const { reasoning, answer } = written(state.sample);
  find("edited").hidden = mine?.decision !== "edit";
  put("reasoning", reasoning, "No reasoning could be read; see the raw reply.");
  put("answer", answer, "No answer could be read; see the raw reply.");
  find("note").value = mine?.note || "";
  const mark = state.marks[state.number];
  find("mine").hidden = mark === ".";
  find("mine").dataset.mark = mark;
  put("mine", `you ${WORDS[mark]} it${mine?.why ? `: ${mine.why}` : ""}`);
}

function renderProgress() {
  const total = state.marks.length;
  const done = state.marks.filter((mark) => mark !== ".").length;
  put("progress", `${done} of ${total} decided, ${total - done} left`);
  put("total", total);
  find("at").max = total;
  find("bar").max = total;
  find("bar").value = done;
  if (find("strata-box").open) renderStrata();
}

const row = (...cells) => el("tr", {}, ...cells.map((cell) => el("td", {}, cell)));

function renderStrata() {
  find("strata").replaceChildren(...state.strata.map(({ name, numbers, how, size }) => {
    const left = numbers.filter((number) => state.marks[number] === ".");
    const open = button(name, () => act(() => show(left[0] ?? numbers[0])), { class: "link" });
    return row(open, `${numbers.length - left.length} of ${numbers.length}`, left.length, how, size);
  }));
}

function renderAgreement(pairs) {
  const rows = pairs.map(({ first, second, n, agreed, kappa, low, high }) => {
    const [value, range] = kappa === null ? ["undefined", ""] : [kappa.toFixed(3), `${low.toFixed(3)} to ${high.toFixed(3)}`];
    return row(`${first}, ${second}`, n, `${(100 * agreed).toFixed(1)} %`, value, range);
  });
  find("agreement").replaceChildren(...(rows.length ? rows : [row("No two reviewers have judged the same sample yet.")]));
}

function setMode(mode) {
  const before = state.mode;
  state.mode = mode;
  find("why").hidden = mode !== "why";
  find("drop").setAttribute("aria-expanded", String(mode === "why"));
  find("editor").hidden = mode !== "edit";
  find("written").hidden = mode === "edit";
  find("choices").disabled = mode === "edit";
  if (mode === "why") find("reasons").firstElementChild?.focus();
  if (mode === "look" && before !== "look") document.activeElement?.blur();
}

/** The next undecided sample after `number`, round the end; -1 where all are decided. */
function after(number) {
  const next = state.marks.indexOf(".", number + 1);
  const first = state.marks.indexOf(".");
  return next < 0 && first < number ? first : next;
}

async function decide(decision, more = {}) {
  const { number, sample } = state;
  const posted = { number, reviewer: state.reviewer, decision, sample: sample.sample, note: find("note").value, ...more };
  const { mark } = await askJson("/api/decide", posted);
  state.marks[number] = mark;
  sample.mine = { why: "", reasoning: "", answer: "", ...posted };
  const next = after(number);
  if (next < 0) {
    setMode("look");
    render();
    announce(`Sample ${number + 1} ${WORDS[mark]}. All ${state.marks.length} are decided.`);
    return;
  }
  await show(next);
  announce(`Sample ${number + 1} ${WORDS[mark]}. Now sample ${next + 1} of ${state.marks.length}. ${find("fate").textContent}`);
}

async function undo() {
  const { number, mark } = await askJson("/api/undo", { reviewer: state.reviewer });
  if (number < 0) {
    announce("There is nothing to undo.");
    return;
  }
  state.marks[number] = mark;
  state.ahead.clear();
  await show(number);
  announce(`Undone. Sample ${number + 1} is ${WORDS[mark]}.`);
}

async function go(step) {
  const number = state.number + step;
  if (number < 0 || number >= state.marks.length) {
    announce(step > 0 ? "This is the last sample." : "This is the first sample.");
    return;
  }
  await show(number);
  announce(`Sample ${number + 1} of ${state.marks.length}, ${WORDS[state.marks[number]]}. ${find("fate").textContent}`);
}

function edit() {
  const { reasoning, answer } = written(state.sample);
  find("edit-reasoning").value = reasoning;
  find("edit-answer").value = answer;
  setMode("edit");
  find("edit-reasoning").focus();
}

const saveEdit = () => decide("edit", { reasoning: find("edit-reasoning").value, answer: find("edit-answer").value });

function turnTarget(step) {
  const count = state.sample.targets.length;
  if (count > 1) {
    state.target = (state.target + step + count) % count;
    renderTarget();
  }
}

const KEYS = {
  k: () => act(() => decide("keep")),
  d: () => setMode(state.mode === "why" ? "look" : "why"),
  e: edit,
  u: () => act(undo),
  n: () => act(() => go(1), true),
  p: () => act(() => go(-1), true),
  "[": () => turnTarget(-1),
  "]": () => turnTarget(1),
  r: () => { find("raw-box").open = !find("raw-box").open; },
  m: () => find("note").focus(),
  "?": () => openDialog(find("help")),
};

KEYS.ArrowRight = KEYS.n;
KEYS.ArrowLeft = KEYS.p;

document.addEventListener("keydown", (event) => {
  if (!state.sample || document.querySelector("dialog[open]")) return;
  const typing = event.target.matches("input, textarea");
  if (event.key === "Escape") {
    setMode("look");
    if (typing) event.target.blur();
    return;
  }
  if (state.mode === "edit") {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      act(saveEdit);
    }
    return;
  }
  if (event.target.id === "note" && event.key === "Enter") event.target.blur();
  if (typing || event.repeat || event.ctrlKey || event.metaKey || event.altKey || !find("keys").checked) return;
  const why = state.mode === "why" ? state.reasons[Number(event.key) - 1] : undefined;
  const run = state.mode === "why" ? why && (() => act(() => decide("drop", { why }))) : KEYS[event.key];
  if (run) {
    event.preventDefault();
    run();
  }
});

for (const pressed of document.querySelectorAll("[data-key]")) pressed.addEventListener("click", KEYS[pressed.dataset.key]);
onClick("edit-cancel", () => { setMode("look"); find("edit").focus(); });
onClick("who", askName);
find("editor").addEventListener("submit", (event) => { event.preventDefault(); act(saveEdit); });
find("jump").addEventListener("submit", (event) => { event.preventDefault(); find("at").blur(); });
find("at").addEventListener("change", () => act(() => {
  const number = Math.min(Math.max(Math.trunc(Number(find("at").value)) || 1, 1), state.marks.length);
  return show(number - 1);
}));
find("strata-box").addEventListener("toggle", renderProgress);
find("agreement-box").addEventListener("toggle", () => {
  if (find("agreement-box").open) act(async () => renderAgreement((await askReview(state.reviewer)).agreement));
});
find("keys").addEventListener("change", () => setting("traceir-keys", find("keys").checked ? "on" : "off"));

/** Keeps a setting in the browser, or reads it; a browser that keeps nothing still reviews. */
function setting(name, value) {
  try {
    if (value !== undefined) localStorage.setItem(name, value);
    return localStorage.getItem(name) || "";
  } catch {
    return "";
  }
}

function askName() {
  find("name").value = state.reviewer;
  find("name-box").showModal();
}

find("name-box").addEventListener("cancel", (event) => { if (!state.reviewer) event.preventDefault(); });
find("name-form").addEventListener("submit", () => act(() => begin(find("name").value))); // closes its dialog by itself

async function begin(reviewer) {
  const { marks, strata, reasons, build, agreement } = await askReview(reviewer);
  Object.assign(state, { reviewer, marks: [...marks], strata, reasons });
  state.ahead.clear();
  setting("traceir-reviewer", reviewer);
  put("build", build);
  put("who", `Reviewer: ${reviewer}`);
  find("reasons").replaceChildren(...reasons.map((why, place) =>
    button([`${why} `, el("kbd", { text: place + 1 })], () => act(() => decide("drop", { why })))));
  const named = Number(new URL(location.href).searchParams.get("n"));
  const first = named >= 1 && named <= state.marks.length ? named - 1 : Math.max(state.marks.indexOf("."), 0);
  await show(first);
  renderAgreement(agreement);
  find("main").hidden = false;
  find("actions").hidden = false;
}

find("keys").checked = setting("traceir-keys") !== "off";
act(async () => {
  const { reviewer } = await askJson("/api/start");
  const name = new URL(location.href).searchParams.get("reviewer") || reviewer || setting("traceir-reviewer");
  if (name) await begin(name);
  else askName();
});
