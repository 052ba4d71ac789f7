// A filter as a text in the one language of all of TraceIR: its conditions, those that controls write, and what a collection suggests.

const CONDITION = /^\s*(\(|not\b|("[^"]*"|'[^']*'|[^\s()"'=!<>~]+)\s*(=|!=|<|>|~|in\b|is\b))/i;
const TOKENS = /"[^"]*"|'[^']*'|[()]|\s(?:and|or)\s|./gis;

// The conditions that must all hold; the whole where one of several is enough.
export function conditionsOf(text) {
  const parts = [""];
  let [depth, at] = [0, 0];
  for (const [token] of text.matchAll(TOKENS)) {
    at += token.length;
    depth += token === "(" ? 1 : token === ")" ? -1 : 0;
    const joins = depth === 0 && /^\s(and|or)\s$/i.test(token) && CONDITION.test(text.slice(at));
    if (joins && /or/i.test(token)) return [text.trim()];
    if (joins) parts.push("");
    else parts[parts.length - 1] += token;
  }
  return parts.map((part) => part.trim()).filter(Boolean);
}

export const joined = (conditions) => [...new Set(conditions)].map((one, _, all) => (all.length > 1 && needsBraces(one) ? `(${one})` : one)).join(" and ");

const needsBraces = (text) => conditionsOf(text.replace(/\sor\s/gi, " and ")).length > 1;

const inQuotes = (text) => `"${text.replaceAll('"', '""')}"`;
const quoted = (value) => (/^[\p{L}\p{N}_]([\p{L}\p{N}_ .:+-]*[\p{L}\p{N}_.:+-])?$/u.test(value) && !/\b(and|or)\b/i.test(value) ? value : inQuotes(value));
const named = (name) => (/^[\p{L}_][\p{L}\p{N}_.-]*$/u.test(name) && !/^(and|or|not|in|is)$/i.test(name) ? name : inQuotes(name));

// The condition that a value of a facet stands for.
export function conditionFor({ name, kind }, value) {
  if (kind === "folder") return `id~${inQuotes(`${value}*`)}`;
  if (kind === "date") return `${named(name)}>=${value} and ${named(name)}<=${value}`;
  return `${named(name)}=${kind === "text" ? quoted(value) : value}`;
}

// The ends of a date's range among conditions, as YYYY-MM-DD; "" where there is none.
export function rangeOf(conditions, name) {
  const end = (sign) => conditions.map((one) => one.match(ends(name))).find((match) => match?.[1] === sign)?.[2] ?? "";
  return [whole(end(">="), false), whole(end("<="), true)];
}

// The first or last day of a year or month.
function whole(date, last) {
  if (!date || date.length === 10) return date;
  const month = date.length === 7 ? date : `${date}-${last ? "12" : "01"}`;
  return `${month}-${last ? new Date(Date.UTC(...month.split("-"), 0)).getUTCDate() : "01"}`;
}

export function withRange(conditions, name, [low, high]) {
  const others = conditions.filter((one) => !ends(name).test(one));
  return [...others, low && `${named(name)}>=${low}`, high && `${named(name)}<=${high}`].filter(Boolean);
}

const ends = (name) => new RegExp(`^["']?${name.replace(/\W/g, "\\$&")}["']?\\s*(>=|<=)\\s*["']?(\\d{4}(?:-\\d\\d){0,2})["']?$`);

// Whole texts to choose from while a filter is typed.
export function suggestionsFor(text, facets) {
  const base = text.match(/^.*\sand\s+(?!.*\sand\s)/is)?.[0] ?? "";
  const all = facets.flatMap((facet) => facet.values.map(([value]) => conditionFor(facet, value)));
  return [...new Set(all)].map((one) => base + one);
}

// The facets that are worth a row of buttons: years, folders that are not years, and texts that several items share.
export function rowsOf(facets) {
  const worth = ({ kind, name }, [value, count]) => (kind === "date" ? count : count > 1 && name !== "name" && !/^\d{4}\/$/.test(value));
  return facets.filter(({ kind }) => ORDER.includes(kind)).map((facet) => ({ ...facet, values: facet.values.filter((value) => worth(facet, value)) }))
    .filter(({ values }) => values.length > 1).sort((first, second) => ORDER.indexOf(first.kind) - ORDER.indexOf(second.kind)).slice(0, 4)
    .map((facet) => (facet.kind === "date" ? { ...facet, values: facet.values.sort(([first], [second]) => (first < second ? 1 : -1)) } : facet));
}

const ORDER = ["date", "folder", "text"];
