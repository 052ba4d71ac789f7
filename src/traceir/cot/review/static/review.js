// The review page: one sample at a time; a decision counts once the server has answered. Text from data is only ever textContent.

const byId = (id) => document.getElementById(id);
const WORDS = { k: "kept", d: "dropped", e: "edited", ".": "undecided" };

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

class Refusal extends Error {}

async function ask(path, body) {
  const options = body ? { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body) } : {};
  let reply;
  try {
    reply = await fetch(path, options);
  } catch {
    throw new Refusal("The server does not answer: nothing was saved. Start it again; what was saved before is safe.");
  }
  const found = await reply.json().catch(() => ({}));
  if (!reply.ok) throw new Refusal(found.error?.message || found.error || `The server answered ${reply.status}.`);
  return found;
}

const ofReviewer = () => `reviewer=${encodeURIComponent(state.reviewer)}`;

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
    tell(error instanceof Refusal ? error.message : `The page is at fault: ${error}`);
    if (!(error instanceof Refusal)) reportError(error);
  } finally {
    state.busy -= 1;
  }
}

function tell(problem) {
  byId("alert").textContent = problem;
  byId("alert").hidden = !problem;
}

const announce = (text) => { byId("live").textContent = text; };

// Showing

function put(id, text, absent = "") {
  const element = byId(id);
  element.textContent = text || absent;
  element.classList.toggle("absent", !text);
}

function putPicture(name, address) {
  byId(`${name}-link`).hidden = !address;
  for (const [id, attribute] of [[`${name}-link`, "href"], [`${name}-picture`, "src"]]) {
    if (address) byId(id).setAttribute(attribute, address);
    else byId(id).removeAttribute(attribute);
  }
}

async function show(number) {
  const known = state.ahead.get(number);
  state.ahead.clear();
  const sample = await (known || ask(`/api/sample/${number}?${ofReviewer()}`));
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
  if (next < 0 || next === state.number) return;
  const asked = ask(`/api/sample/${next}?${ofReviewer()}`);
  asked.then((sample) => {
    for (const address of [sample.query.picture, sample.targets[0]?.picture]) if (address) new Image().src = address;
  }).catch(() => state.ahead.delete(next));
  state.ahead.set(next, asked);
}

function render() {
  const { sample, number } = state;
  byId("at").value = number + 1;
  byId("status").dataset.fate = sample.status;
  put("fate", fate(sample));
  put("detail", sample.detail || sample.verdict_reason);
  put("task", sample.task);
  put("qid", sample.qid);
  put("how", sample.how === "doubt" ? "drawn by doubt" : "drawn at random");
  put("instruction", sample.instruction);
  put("query-text", sample.query.text);
  putPicture("query", sample.query.picture);
  put("raw", sample.raw, "There was no reply.");
  put("assessment", sample.z ? `Complex, ${sample.confidence.toFixed(2)} sure. ${sample.assessment}` : sample.assessment);
  put("provenance", sample.provenance);
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
  byId("targets").hidden = targets.length < 2;
  put("target-place", `${state.target + 1} of ${targets.length}`);
  put("target-did", target?.did, "The target is not in the pool.");
  put("target-text", target?.text);
  putPicture("target", target?.picture);
}

function renderWritten() {
  const { mine } = state.sample;
  const edited = mine?.decision === "edit";
  const { reasoning, answer } = edited ? mine : state.sample;
  byId("edited").hidden = !edited;
  put("reasoning", reasoning, "No reasoning could be read; see the raw reply.");
  put("answer", answer, "No answer could be read; see the raw reply.");
  byId("note").value = mine?.note || "";
  const mark = state.marks[state.number];
  byId("mine").hidden = mark === ".";
  byId("mine").dataset.mark = mark;
  put("mine", `you ${WORDS[mark]} it${mine?.why ? `: ${mine.why}` : ""}`);
}

function renderProgress() {
  const total = state.marks.length;
  const done = state.marks.filter((mark) => mark !== ".").length;
  put("progress", `${done} of ${total} decided, ${total - done} left`);
  put("total", String(total));
  byId("at").max = total;
  byId("bar").max = total;
  byId("bar").value = done;
  if (byId("strata-box").open) renderStrata();
}

function row(...cells) {
  const line = document.createElement("tr");
  for (const cell of cells) {
    const place = document.createElement("td");
    place.append(cell); // a string becomes a text node
    line.append(place);
  }
  return line;
}

function renderStrata() {
  byId("strata").replaceChildren(...state.strata.map((stratum) => {
    const left = stratum.numbers.filter((number) => state.marks[number] === ".");
    const name = document.createElement("button");
    name.type = "button";
    name.className = "plain";
    name.textContent = stratum.name;
    name.addEventListener("click", () => act(() => show(left[0] ?? stratum.numbers[0])));
    const drawn = stratum.numbers.length;
    return row(name, `${drawn - left.length} of ${drawn}`, String(left.length), stratum.how, String(stratum.size));
  }));
}

function renderAgreement(pairs) {
  byId("agreement-none").hidden = pairs.length > 0;
  byId("agreement-table").hidden = pairs.length === 0;
  byId("agreement").replaceChildren(...pairs.map((pair) => {
    const [kappa, reach] = pair.kappa === null
      ? ["undefined", ""] : [pair.kappa.toFixed(3), `${pair.low.toFixed(3)} to ${pair.high.toFixed(3)}`];
    return row(`${pair.first}, ${pair.second}`, String(pair.n), `${(100 * pair.agreed).toFixed(1)} %`, kappa, reach);
  }));
}

function setMode(mode) {
  const before = state.mode;
  state.mode = mode;
  byId("why").hidden = mode !== "why";
  byId("drop").setAttribute("aria-expanded", String(mode === "why"));
  byId("editor").hidden = mode !== "edit";
  byId("written").hidden = mode === "edit";
  for (const button of byId("choices").children) button.disabled = mode === "edit";
  if (mode === "why") byId("reasons").firstElementChild?.focus();
  if (mode === "look" && before !== "look") document.activeElement?.blur();
}

// Deciding

/** The next undecided sample after `number`, round the end; -1 where all are decided. */
function after(number) {
  const total = state.marks.length;
  for (let step = 1; step <= total; step++) {
    const place = (number + step) % total;
    if (state.marks[place] === "." && place !== number) return place;
  }
  return -1;
}

async function decide(decision, more = {}) {
  const { number, sample } = state;
  const note = byId("note").value;
  const told = { number, reviewer: state.reviewer, decision, sample: sample.sample, note, ...more };
  const { mark } = await ask("/api/decide", told);
  state.marks[number] = mark;
  sample.mine = { why: "", reasoning: "", answer: "", ...told };
  const next = after(number);
  if (next < 0) {
    setMode("look");
    render();
    announce(`Sample ${number + 1} ${WORDS[mark]}. All ${state.marks.length} are decided.`);
    return;
  }
  await show(next);
  announce(`Sample ${number + 1} ${WORDS[mark]}. Now sample ${next + 1} of ${state.marks.length}. ${byId("fate").textContent}`);
}

async function undo() {
  const { number, mark } = await ask("/api/undo", { reviewer: state.reviewer });
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
  announce(`Sample ${number + 1} of ${state.marks.length}, ${WORDS[state.marks[number]]}. ${byId("fate").textContent}`);
}

function edit() {
  const { mine } = state.sample;
  const { reasoning, answer } = mine?.decision === "edit" ? mine : state.sample;
  byId("edit-reasoning").value = reasoning;
  byId("edit-answer").value = answer;
  setMode("edit");
  byId("edit-reasoning").focus();
}

const saveEdit = () => decide("edit", { reasoning: byId("edit-reasoning").value, answer: byId("edit-answer").value });

function turnTarget(step) {
  const count = state.sample.targets.length;
  if (count > 1) {
    state.target = (state.target + step + count) % count;
    renderTarget();
  }
}

// Keys

const KEYS = {
  k: () => act(() => decide("keep")),
  d: () => setMode(state.mode === "why" ? "look" : "why"),
  e: edit,
  u: () => act(undo),
  n: () => act(() => go(1), true),
  p: () => act(() => go(-1), true),
  "[": () => turnTarget(-1),
  "]": () => turnTarget(1),
  r: () => { byId("raw-box").open = !byId("raw-box").open; },
  m: () => byId("note").focus(),
  "?": () => byId("help").showModal(),
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
  if (typing || event.repeat || event.ctrlKey || event.metaKey || event.altKey || !byId("keys").checked) return;
  const why = state.mode === "why" ? state.reasons[Number(event.key) - 1] : undefined;
  const run = state.mode === "why" ? why && (() => act(() => decide("drop", { why }))) : KEYS[event.key];
  if (run) {
    event.preventDefault();
    run();
  }
});

for (const button of document.querySelectorAll("[data-key]")) button.addEventListener("click", KEYS[button.dataset.key]);
byId("edit-cancel").addEventListener("click", () => { setMode("look"); byId("edit").focus(); });
byId("who").addEventListener("click", askName);
byId("editor").addEventListener("submit", (event) => { event.preventDefault(); act(saveEdit); });
byId("jump").addEventListener("submit", (event) => { event.preventDefault(); byId("at").blur(); });
byId("at").addEventListener("change", () => act(async () => {
  const number = Math.min(Math.max(Math.trunc(Number(byId("at").value)) || 1, 1), state.marks.length) - 1;
  await show(number);
}));
byId("strata-box").addEventListener("toggle", renderProgress);
byId("agreement-box").addEventListener("toggle", () => {
  if (byId("agreement-box").open) act(async () => renderAgreement((await ask(`/api/review?${ofReviewer()}`)).agreement));
});
byId("keys").addEventListener("change", () => setting("traceir-keys", byId("keys").checked ? "on" : "off"));

// Beginning

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
  byId("name").value = state.reviewer;
  byId("name-box").showModal();
}

byId("name-box").addEventListener("cancel", (event) => { if (!state.reviewer) event.preventDefault(); });
byId("name-form").addEventListener("submit", (event) => {
  event.preventDefault();
  byId("name-box").close();
  act(() => begin(byId("name").value));
});

async function begin(reviewer) {
  const found = await ask(`/api/review?reviewer=${encodeURIComponent(reviewer)}`);
  Object.assign(state, { reviewer, marks: [...found.marks], strata: found.strata, reasons: found.reasons });
  state.ahead.clear();
  setting("traceir-reviewer", reviewer);
  put("build", found.build);
  put("who", `Reviewer: ${reviewer}`);
  byId("reasons").replaceChildren(...found.reasons.map((why, place) => {
    const button = document.createElement("button");
    const key = document.createElement("kbd");
    key.textContent = String(place + 1);
    button.type = "button";
    button.append(`${why} `, key);
    button.addEventListener("click", () => act(() => decide("drop", { why })));
    return button;
  }));
  const named = Number(new URL(location.href).searchParams.get("n"));
  const first = named >= 1 && named <= state.marks.length ? named - 1 : Math.max(state.marks.indexOf("."), 0);
  await show(first);
  renderAgreement(found.agreement);
  byId("main").hidden = false;
  byId("actions").hidden = false;
}

byId("keys").checked = setting("traceir-keys") !== "off";
act(async () => {
  const { reviewer } = await ask("/api/start");
  const name = new URL(location.href).searchParams.get("reviewer") || reviewer || setting("traceir-reviewer");
  if (name) await begin(name);
  else askName();
});
