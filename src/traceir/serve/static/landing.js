// What the page shows before the first search: what the server holds, examples, or why there is nothing yet.

import { announce, button, el, find, plural, say } from "./dom.js";
import { NOUNS, fromRecord } from "./query.js";
import { thumb } from "./reasoning.js";

const EMPTY_HELP = "traceir index add FOLDER --index DIR";
const code = (text) => el("code", { text });

// `choose(query)` runs an example.
export function drawLanding(config, choose) {
  const counts = Object.entries(config.count ?? {}).filter(([, count]) => count > 0);
  say(find("collection"), counts.map(([modality, count]) => plural(count, NOUNS[modality] ?? modality)).join(" · ") || "nothing indexed yet");
  find("home").setAttribute("aria-label", `${config.title}, start page`);
  if (!counts.length) {
    showNotice("The collection is empty", el("p", {}, "Add a folder of pictures and texts with ", code(EMPTY_HELP), ", or post them to ",
      code("/items"), ". Then load this page again."));
  } else if (config.world && config.instead.length) {
    showNotice("This model does not know your collection", el("div", {}, el("p", { dir: "auto", text: config.world }),
      el("p", { text: "Hits that mean something take a model that knows such things, for instance:" }),
      ...config.instead.map((command) => el("p", {}, code(command)))));
  } else if (config.world) {
    showNotice("What this model knows", config.world);
  } else {
    find("notice").hidden = true;
  }
  const examples = config.examples ?? [];
  find("examples-part").hidden = !examples.length;
  find("examples").replaceChildren(...examples.map((example) => drawExample(example, choose)));
}

function drawExample(example, choose) {
  const query = fromRecord(example);
  return el("li", {}, el("button", { type: "button", class: "example", on: { click: () => choose(query) } }, thumb(query.picture),
    el("span", {}, el("b", { dir: "auto", text: example.title }), el("span", { class: "asked", dir: "auto", text: query.text || query.instruction }))));
}

// A message above the welcome; `retry` adds a button.
export function showNotice(title, body, retry = null) {
  announce(title);
  find("notice").hidden = false;
  find("notice").replaceChildren(el("h2", { text: title }), typeof body === "string" ? el("p", { dir: "auto", text: body }) : body,
    ...(retry ? [button("Try again", retry, { class: "strong" })] : []));
}
