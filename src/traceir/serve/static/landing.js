// What the page shows before the first search: what the server holds, examples, or why there is nothing yet.

import { announce, button, el, find, say } from "./dom.js";
import { NOUNS, fromRecord, kindOf } from "./query.js";
import { shownPicture } from "./reasoning.js";

const KINDS = { text: "by words", image: "by picture", "image,text": "by picture and words" };
const EMPTY_HELP = "traceir index add FOLDER --index DIR";

// `choose(query)` runs an example.
export function drawLanding(config, choose) {
  const counts = Object.entries(config.count ?? {}).filter(([, count]) => count > 0);
  const total = counts.reduce((sum, [, count]) => sum + count, 0);
  const parts = counts.map(([modality, count]) => `${count.toLocaleString("en")} ${NOUNS[modality] ?? modality}${count === 1 ? "" : "s"}`);
  say(find("collection"), total ? parts.join(" · ") : "nothing indexed yet");
  if (config.title) {
    document.title = config.title;
    find("home").setAttribute("aria-label", `${config.title}, start page`);
  }
  if (total === 0) {
    showNotice("The collection is empty", el("p", {}, "Add a folder of pictures and texts with ", el("code", { text: EMPTY_HELP }),
      ", or post them to ", el("code", { text: "/items" }), ". Then load this page again."));
  } else if (config.world && config.instead?.length) {
    showNotice("This model does not know your collection", el("div", {}, el("p", { dir: "auto", text: config.world }),
      el("p", { text: "Hits that mean something take a model that knows such things, for instance:" }),
      ...config.instead.map((command) => el("p", {}, el("code", { text: command })))));
  } else if (config.world) {
    showNotice("What this model knows", config.world);
  } else {
    hideNotice();
  }
  drawExamples(Array.isArray(config.examples) ? config.examples : [], choose);
}

function drawExamples(examples, choose) {
  find("examples-part").hidden = !examples.length;
  find("examples").replaceChildren(...examples.map((example) => {
    const query = fromRecord(example);
    const img = query.picture ? el("img", { alt: "", class: "thumb" }) : null;
    if (img) shownPicture(img, query.picture);
    return el("li", {}, el("button", { type: "button", class: "example", on: { click: () => choose(query) } }, img,
      el("span", {}, el("b", { dir: "auto", text: example.title ?? KINDS[kindOf(query)] }), el("span", { class: "asked", dir: "auto", text: query.text || query.instruction }))));
  }));
}

// A message in place of the welcome; `retry` adds a button.
export function showNotice(title, body, retry = null) {
  announce(title);
  find("notice").hidden = false;
  find("notice").replaceChildren(el("h2", { text: title }), typeof body === "string" ? el("p", { dir: "auto", text: body }) : body,
    ...(retry ? [button("Try again", retry, { class: "strong" })] : []));
}

export function hideNotice() {
  find("notice").hidden = true;
}
