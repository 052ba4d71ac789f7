// One search as it goes on: what is known of it so far, changed in place as events come.

import { isAbort, postSearch, streamSearch } from "./api.js";
import { cutoffFor } from "./cutoff.js";
import { toRequest } from "./query.js";

export const PAGE = 12;

// status: "idle", "running", "done", "failed" or "stopped". cutoff: what is asked for, cut: what the answer says of it.
export function newRun(query, route = query.route, cutoff = cutoffFor(query)) {
  return { query, asked: route, cutoff, status: "idle", route: null, probability: null, reasoning: "", trace: null, hits: [], more: false,
    cut: null, note: null, error: null, paging: false };
}

export const isOver = (run) => run.status !== "running" && run.status !== "idle";

// Runs it to its end and never throws, but for a refused key (401), which the caller answers. `changed(what)` comes after every event.
export async function follow(run, signal, changed) {
  Object.assign(run, { status: "running", route: null, probability: null, reasoning: "", trace: null, hits: [], more: false, cut: null, note: null, error: null });
  changed("start");
  try {
    for await (const { event, data } of streamSearch(toRequest(run.query, { k: PAGE, route: run.asked, cutoff: run.cutoff }), signal)) {
      take(run, event, data);
      changed(event);
    }
  } catch (error) {
    run.status = isAbort(error) ? "stopped" : "failed";
    run.error = isAbort(error) ? null : error;
    changed("end");
    if (error.status === 401) throw error;
  }
}

function take(run, event, data) {
  if (event === "route") {
    run.route = data.route ?? null;
    run.probability = data.emb_probability ?? null;
  } else if (event === "reasoning") {
    run.reasoning = String(data.text ?? "");
  } else if (event === "hits") {
    run.trace = data.trace ?? {};
    run.route = run.trace.route ?? run.route;
    run.probability = run.trace.emb_probability ?? run.probability;
    run.reasoning = run.trace.reasoning ?? run.reasoning;
    run.hits = Array.isArray(data.hits) ? data.hits : [];
    run.more = Boolean(data.more);
    run.note = data.note ?? null;
    run.cut = data.cutoff ?? null;
    run.status = "done";
  }
}

// The next page, behind what is there; returns how many hits came. Throws what the server says.
export async function nextPage(run, signal) {
  const answer = await postSearch(toRequest(run.query, { k: PAGE, offset: run.hits.length, route: run.asked, cutoff: run.cutoff }), signal);
  const known = new Set(run.hits.map((hit) => hit.id));
  const fresh = answer.hits.filter((hit) => !known.has(hit.id));
  run.hits = [...run.hits, ...fresh];
  run.more = Boolean(answer.more) && fresh.length > 0;
  return fresh.length;
}

// The steps of a reasoning: split at each "; " and new line, without the blanks that a tokenizer leaves before punctuation.
export function stepsOf(reasoning) {
  return reasoning.trim().replace(/[^\S\n]+([,.;:?!])/g, "$1").split(/;(?:\s+|$)|\n+/).map((step) => step.trim()).filter(Boolean);
}

// Where hits moved: for each id of `mine`, its rank among `theirs` less its own rank here; null where it is not among them.
export function moves(mine, theirs) {
  const places = new Map(theirs.map((hit, place) => [hit.id, place]));
  return new Map(mine.map((hit, place) => [hit.id, places.has(hit.id) ? places.get(hit.id) - place : null]));
}
