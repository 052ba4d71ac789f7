// Elements, made so that text from data can only ever become text.

const TOGETHER = 120; // milliseconds

export const find = (id) => document.getElementById(id);

// A new element. Attributes: `class`, `text`, `on` (listeners by name), `data` (dataset), `props` (properties), and any other
// by its name; false and null leave one out. Children that are strings become text nodes.
export function el(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "class") made.className = value;
    else if (name === "text") made.textContent = String(value);
    else if (name === "on") for (const [kind, what] of Object.entries(value)) made.addEventListener(kind, what);
    else if (name === "data") Object.assign(made.dataset, value);
    else if (name === "props") Object.assign(made, value);
    else made.setAttribute(name, value === true ? "" : String(value));
  }
  made.append(...children.filter((child) => child !== null && child !== undefined && child !== false));
  return made;
}

export function icon(name) {
  const space = "http://www.w3.org/2000/svg";
  const svg = document.createElementNS(space, "svg");
  const use = document.createElementNS(space, "use");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  use.setAttribute("href", `#i-${name}`);
  svg.append(use);
  return svg;
}

export function button(text, onclick, attributes = {}) {
  return el("button", { type: "button", text, ...attributes, on: { click: onclick } });
}

// Sets text only where it changed, so that selections and screen readers are left in peace.
export function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

let untold = [];

// Tells screen readers. What comes within a moment is told together, or the last would drown the rest; the same words twice are told twice.
export function announce(text) {
  if (!text) return;
  if (!untold.length) setTimeout(tell, TOGETHER);
  untold.push(text);
}

function tell() {
  const live = find("live");
  const text = untold.join(" ");
  untold = [];
  live.textContent = live.textContent === text ? `${text} ` : text;
}

let toastEnds = 0;

// A short message that goes away by itself, told to screen readers too.
export function toast(text) {
  announce(text);
  const place = find("toast");
  place.textContent = text;
  place.hidden = false;
  clearTimeout(toastEnds);
  toastEnds = setTimeout(() => { place.hidden = true; }, 4000);
}

// Opens a modal dialog; a click beside it and every [data-close] in it close it. Focus goes back by itself.
export function openDialog(dialog) {
  if (!dialog.dataset.ready) {
    dialog.dataset.ready = "yes";
    dialog.addEventListener("click", (event) => {
      if (event.target === dialog || event.target.closest("[data-close]")) dialog.close();
    });
  }
  if (!dialog.open) dialog.showModal();
}

export const isTyping = (target) => target instanceof HTMLElement &&
  (target.isContentEditable || target instanceof HTMLTextAreaElement || target instanceof HTMLSelectElement ||
    (target instanceof HTMLInputElement && !["radio", "checkbox", "file", "button"].includes(target.type)));

// A number with fixed digits, or a dash where there is none.
export const fixed = (value, digits = 3) => (Number.isFinite(value) ? value.toFixed(digits) : "–");

// Seconds as people read them.
export function seconds(value) {
  if (!Number.isFinite(value)) return "";
  if (value < 0.0005) return "<1 ms";
  return value < 1 ? `${Math.round(value * 1000)} ms` : `${value.toFixed(value < 10 ? 2 : 1)} s`;
}

export const plural = (count, one, many = `${one}s`) => `${count.toLocaleString("en")} ${count === 1 ? one : many}`;
