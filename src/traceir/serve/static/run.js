// One search as it goes on: what is known of it so far, changed in place as events come.

import { askJson, isAbort, streamSearch } from "./api.js";
import { toRequest } from "./query.js";

export const PAGE = 12;

const fresh = () => ({ route: null, probability: null, reasoning: "", trace: null, hits: [], more: false, cut: null, note: null, error: null });

// status: "idle", "running", "done", "failed" or "stopped". cutoff: what is asked for, cut: what the answer says of it.
export const newRun = (query, cutoff, route = query.route) => ({ query, asked: route, cutoff, status: "idle", paging: false, ...fresh() });

const requestOf = (run, offset) => toRequest(run.query, { k: PAGE, offset, route: run.asked, cutoff: run.cutoff });

// Runs it to its end and never throws, but for a refused key (401), which the caller answers. `changed(what)` comes after every event.
export async function follow(run, signal, changed) {
  Object.assign(run, { status: "running", ...fresh() });
  changed("start");
  try {
    for await (const { event, data } of streamSearch(requestOf(run, 0), signal)) {
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
    const { hits, trace = {}, more, note = null, cutoff = null } = data;
    Object.assign(run, { trace, hits: Array.isArray(hits) ? hits : [], more: Boolean(more), note, cut: cutoff, status: "done" });
    run.route = trace.route ?? run.route;
    run.probability = trace.emb_probability ?? run.probability;
    run.reasoning = trace.reasoning ?? run.reasoning;
  }
}

// The next page, behind what is there; returns how many hits came. Throws what the server says.
export async function nextPage(run) {
  const answer = await askJson("/search", requestOf(run, run.hits.length));
  const known = new Set(run.hits.map((hit) => hit.id));
  const more = answer.hits.filter((hit) => !known.has(hit.id));
  run.hits = [...run.hits, ...more];
  run.more = Boolean(answer.more) && more.length > 0;
  return more.length;
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
